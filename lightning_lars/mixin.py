"""The door for those who subclass: a LightningModule's ``configure_optimizers``."""

from collections.abc import Callable, Iterable
from functools import partial
from inspect import isclass, isfunction
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.serialization import add_safe_globals

from lightning_lars.optim import LAMB, LARS
from lightning_lars.param_groups import DEFAULT_EXCLUDED, Exclusion, build_optimizer

# What a mixin's saved hyperparameters may hold, so that its checkpoints load with weights_only=True.
add_safe_globals([partial, LARS, LAMB, *(each for each in DEFAULT_EXCLUDED if callable(each))])

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
"""Builds an optimizer from parameter groups: ``LARS``, or ``functools.partial(LARS, lr=3.2)``."""


class LargeBatchMixin:
    """Gives a LightningModule a ``configure_optimizers`` that knows its norms and biases.

    Stands before ``LightningModule`` in the bases. The optimizer is built over
    :func:`~lightning_lars.param_groups.param_groups` of the module, after ``configure_model``.

    Args:
        *args: Handed on to the next class.
        optimizer: Takes the parameter groups and returns the optimizer: ``LARS``, ``LAMB``, any
            ``torch.optim`` class, or one with arguments, as ``functools.partial(LARS, lr=3.2)``.
        exclude: What is neither adapted nor decayed, as for
            :func:`~lightning_lars.param_groups.param_groups`.
        exclude_bias: Whether biases are excluded too.
        excluded_lr_scale: Factor, above 0, on the learning rate of what is excluded.
        **kwargs: Handed on to the next class.

    Raises:
        TypeError: If ``optimizer`` cannot be called; when subclassing, if the bases are in an order in
            which ``LightningModule`` would hide the mixin.

    Example:
        >>> from functools import partial
        >>> import lightning
        >>> from torch import nn
        >>> from lightning_lars import LARS, LargeBatchMixin
        >>> class Classifier(LargeBatchMixin, lightning.LightningModule):
        ...     def __init__(self, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
        >>> optimizer = Classifier(optimizer=partial(LARS, lr=3.2)).configure_optimizers()
        >>> for group in optimizer.param_groups:
        ...     print(group["name"], group["lr"], group["param_names"])
        adapted 3.2 ['net.0.weight']
        excluded 3.2 ['net.0.bias', 'net.1.weight', 'net.1.bias']
    """

    def __init__(
        self,
        *args: Any,
        optimizer: OptimizerCallable = LARS,
        exclude: Exclusion | Iterable[Exclusion] = DEFAULT_EXCLUDED,
        exclude_bias: bool = True,
        excluded_lr_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(optimizer, Optimizer) or not callable(optimizer):
            raise TypeError(
                "optimizer must be an optimizer class or a callable that takes parameter groups, such as "
                f"functools.partial(LARS, lr=3.2), got {optimizer!r}"
            )
        self._build_optimizer = optimizer
        self._exclude = (exclude,) if isinstance(exclude, str) or callable(exclude) else tuple(exclude)
        self._exclude_bias = exclude_bias
        self._excluded_lr_scale = excluded_lr_scale
        used = (optimizer.func if isinstance(optimizer, partial) else optimizer, *self._exclude)
        add_safe_globals([each for each in used if isclass(each) or isfunction(each)])

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(LargeBatchMixin)]
        # By name, as lightning.pytorch and pytorch_lightning have a LightningModule each.
        if any(base.__name__ == "LightningModule" for base in before):
            raise TypeError(
                f"{cls.__name__} must have LargeBatchMixin before LightningModule in its bases, got "
                f"({', '.join(base.__name__ for base in cls.__bases__)}): "
                "LightningModule would hide configure_optimizers of the mixin"
            )

    def configure_optimizers(self) -> Optimizer:
        """Build the optimizer over the module's adapted and excluded layers.

        Raises:
            ValueError: If no parameter is trainable, or an argument breaks its rule.
            TypeError: If what ``optimizer`` returns is no optimizer.
        """
        assert isinstance(self, nn.Module)
        return build_optimizer(
            self,
            self._build_optimizer,
            exclude=self._exclude,
            exclude_bias=self._exclude_bias,
            excluded_lr_scale=self._excluded_lr_scale,
        )
