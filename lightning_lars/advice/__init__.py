"""What to expect of a larger batch size, from a short run at a small one.

Only ``advise.py``, which starts it, and ``short_run.py``, which records it, read a Trainer.
"""
