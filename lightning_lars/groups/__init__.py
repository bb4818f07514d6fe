"""Parameter groups: which parameters are adapted, which are excluded, and why.

From modules and original shapes to the groups of an optimizer, and from an optimizer back to what it holds.
"""
