"""Several optimizers as one: each steps its own parameter groups."""
