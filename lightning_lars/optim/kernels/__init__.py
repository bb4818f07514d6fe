"""Fused implementations of what LARS and LAMB do to a layer."""
