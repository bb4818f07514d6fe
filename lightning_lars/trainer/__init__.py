"""What reads or arranges a Trainer: its batch size, its length, its optimizers, its micro-batches.

Here, in `callbacks` and in the doors alone may Lightning be imported.
"""
