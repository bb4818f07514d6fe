"""Arithmetic on lists of tensors, by torch's foreach operations."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Use = Literal["read", "advance", "scratch", "spent"]


class Buffers:
    """The tensors of several layers, and how operations may use them.

    ``"read"``: only read. ``"advance"``: a sum that begins with them is computed in place, as for moments.
    ``"scratch"``: any operation is computed in place, as for intermediate results. ``"spent"``: they were
    overwritten, and reading them raises.
    """

    def __init__(self, tensors: Sequence[Tensor], use: Use) -> None:
        self.tensors, self.use = tensors, use

    def read(self) -> Sequence[Tensor]:
        """Return the tensors."""
        if self.use == "spent":
            raise RuntimeError(
                "an equation reads a moment or an intermediate result after it was overwritten"
            )
        return self.tensors


class TensorList:
    """One tensor for each layer; an operation on the list applies to each tensor.

    ``a + s * b`` is a single ``torch.add(a, b, alpha=s)``, and ``a + s * b * c`` a single ``torch.addcmul``:
    results are rounded as in ``torch.optim``. A factor is a number or what :func:`per_layer_scalars` returns.

    Example:
        >>> import torch
        >>> from lightning_lars.optim.backends.tensor_list import TensorList
        >>> w, g = TensorList([torch.ones(2)]), TensorList([torch.ones(2)])
        >>> (g + 0.5 * w).value()
        (tensor([1.5000, 1.5000]),)
    """

    def __init__(
        self,
        tensors: Sequence[Tensor] | Buffers,
        *,
        use: Use = "read",
        scale: float = 1.0,
        factor: Buffers | None = None,
    ) -> None:
        self.buffers = tensors if isinstance(tensors, Buffers) else Buffers(tensors, use)
        self.scale, self.factor = scale, factor

    def value(self) -> Sequence[Tensor]:
        """Return the tensors, which must not be written to."""
        return self.whole().buffers.read()

    def __mul__(self, other: Any) -> "TensorList":
        if isinstance(other, TensorList):
            factor = Buffers(other.value(), "read")
            return TensorList(self._with_factor().buffers, scale=self.scale, factor=factor)
        if isinstance(other, tuple):
            return self.whole()._apply("mul", _scalar_or_list(other))
        return TensorList(self.buffers, scale=self.scale * other, factor=self.factor)

    def __truediv__(self, other: Any) -> "TensorList":
        if isinstance(other, TensorList):
            return self.whole()._apply("div", other.value())
        if isinstance(other, tuple):
            return self.whole()._apply("div", _scalar_or_list(other))
        return self if other == 1 else self.whole()._apply("div", other)

    def __add__(self, other: Any) -> "TensorList":
        if not isinstance(other, TensorList):
            return self if other == 0 else self.whole()._apply("add", other)
        left = self if self.factor is None else self.whole()
        if left.scale != 1:
            left = left._apply("mul", left.scale, advances=True, ends=False)
        terms, alpha = other.buffers.read(), other.scale
        if other.factor is not None:
            return left._apply("addcmul", terms, other.factor.read(), value=alpha, advances=True)
        return left._apply("add", terms, alpha=alpha, advances=True)

    def __sub__(self, other: Any) -> "TensorList":
        difference: TensorList = self + -1.0 * other
        return difference

    __rmul__, __radd__ = __mul__, __add__

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> "TensorList":
        if function is not torch.sqrt:
            raise TypeError(f"equations are written in + - * / and sqrt, got {function}")
        root: TensorList = args[0].whole()._apply("sqrt")
        return root

    def whole(self) -> "TensorList":
        """Return this list with its scale and factor multiplied into the tensors."""
        each = self._with_factor()
        return each if each.scale == 1 else TensorList(each.buffers)._apply("mul", each.scale)

    def _with_factor(self) -> "TensorList":
        if self.factor is None:
            return self
        product = TensorList(self.buffers)._apply("mul", self.factor.read())
        return TensorList(product.buffers, scale=self.scale)

    def _apply(
        self, operation: str, *args: Any, advances: bool = False, ends: bool = True, **kwargs: Any
    ) -> "TensorList":
        """Apply a foreach operation, in place where the buffers allow it."""
        tensors, use = self.buffers.read(), self.buffers.use
        if use == "scratch" or (advances and use == "advance"):
            getattr(torch, f"_foreach_{operation}_")(tensors, *args, **kwargs)
            self.buffers.use = "spent"
            return TensorList(tensors, use="read" if use == "advance" and ends else use)
        made = getattr(torch, f"_foreach_{operation}")(tensors, *args, **kwargs)
        return TensorList(made, use="scratch")


def per_layer_scalars(value: Any) -> Any:
    """Convert a number, or a tensor of shape ``()`` or ``(layers,)``, to a factor for :class:`TensorList`."""
    if not isinstance(value, Tensor):
        return value
    return tuple(value.unbind()) if value.ndim else (value,)


def _scalar_or_list(numbers: tuple[Tensor, ...]) -> Any:
    return numbers[0] if len(numbers) == 1 else numbers
