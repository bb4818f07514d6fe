"""Tables for the terminal, and the names of repeated blocks in one.

Knows nothing of optimizers: what is printed is handed in.
"""
