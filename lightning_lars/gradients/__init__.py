"""Norms and noise of gradients: percentile clipping and the gradient noise scale.

Torch only: the callbacks of the same names stand on it.
"""
