"""The state of an optimizer: how it is stored between steps, and how checkpoints are loaded into it."""
