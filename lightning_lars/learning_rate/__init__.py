"""The learning rate: its curves and their scheduler, and factors that hold for the length of a step.

Torch only: the folder `trainer` applies it to a Trainer.
"""
