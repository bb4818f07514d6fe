"""Parameter groups: which parameters are adapted, which are excluded, and why.

Decides by modules and original shapes, builds the groups of a new optimizer, and describes or splits those
of an existing one.
"""
