"""Recognizes classes by name.

``lightning`` and ``pytorch_lightning`` define the same classes twice, and the package that defines a class
may not be installed.
"""


def has_class_named(value: object, *names: str) -> bool:
    """Return whether the class of an object, or one of its base classes, has one of these names.

    Example:
        >>> import torch
        >>> from lightning_lars.class_names import has_class_named
        >>> has_class_named(torch.nn.BatchNorm1d(2), "_BatchNorm"), has_class_named(1, "str", "float")
        (True, False)
    """
    return any(base.__name__ in names for base in type(value).__mro__)
