"""What to expect of a larger batch size, from a short run at a small one.

Only ``advise.py``, which runs it, reads a Trainer.
"""
