"""A report of a finished run as one HTML file, from its CSV log, its checkpoint, or both.

Depends on torch only, to read checkpoints.
"""
