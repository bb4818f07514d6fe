"""Norms and noise of gradients: percentile clipping and the gradient noise scale.

Depends on torch only; the callbacks of the same names build on it.
"""
