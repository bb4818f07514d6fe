"""Tables for the terminal, and short names for repeated blocks.

Independent of optimizers: callers pass in what is printed.
"""
