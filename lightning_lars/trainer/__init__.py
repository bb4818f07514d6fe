"""Helpers that read or modify a Trainer: batch size, number of steps, learning rates, micro-batches, logging.

Lightning may be imported only here, in `callbacks`, and in `mixin.py` and `cli.py`.
"""
