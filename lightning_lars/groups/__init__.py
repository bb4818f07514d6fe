"""Parameter groups: which parameters are adapted, which are excluded, and why.

Decides by modules and original shapes, builds the groups of an optimizer, and describes those of an existing
one.
"""
