"""Builds an optimizer over the parameter groups of a module."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lars.combined.combined_optimizer import CombinedOptimizer
from lightning_lars.groups.excluded_rate import (
    check_excluded_rate,
    is_excluded,
    is_matrices,
    set_excluded_rate,
)
from lightning_lars.groups.introspection import Exclusion
from lightning_lars.groups.layer_depth import LayerDepth, scale_rates
from lightning_lars.groups.matrices import Matrices, check_matrices
from lightning_lars.groups.param_groups import param_groups


def build_optimizer(
    module: nn.Module,
    optimizer: Callable[..., Optimizer],
    *,
    exclude: Exclusion | Iterable[Exclusion] = (),
    exclude_norm: bool = True,
    exclude_bias: bool = True,
    exclude_gain: bool = True,
    prefix: str = "",
    excluded_lr: float | None = None,
    excluded_lr_scale: float = 1.0,
    layer_decay: float | None = None,
    layer_depth: LayerDepth | None = None,
    matrix_optimizer: Callable[..., Optimizer] | None = None,
    matrices: Matrices | None = None,
    **optimizer_kwargs: Any,
) -> Optimizer:
    """Build an optimizer over :func:`param_groups`, for use in ``configure_optimizers``.

    Args:
        module: As for :func:`param_groups`.
        optimizer: ``LARS``, ``LAMB``, any other ``torch.optim`` class, or a callable that takes the
            groups (and ``optimizer_kwargs``).
        exclude: As for :func:`param_groups`.
        exclude_norm: As for :func:`param_groups`.
        exclude_bias: As for :func:`param_groups`.
        exclude_gain: As for :func:`param_groups`.
        prefix: As for :func:`param_groups`. To add further modules, call ``optimizer.add_param_group(group)``
            for each of their :func:`param_groups`, with another prefix.
        excluded_lr: Learning rate of the excluded group, above 0, independent of ``lr``. Excluded parameters
            take plain SGD (LARS) or Adam (LAMB) steps, which need far lower rates than layers with trust
            ratios. Schedules and warmup apply to it; ``BatchSizeScaling`` does not, because the group has
            ``batch_size_scaling=False``. None keeps ``lr``.
        excluded_lr_scale: The same as a factor, above 0, on ``lr`` (Barlow Twins: 0.024). Mutually exclusive
            with ``excluded_lr``. Schedulers that set one rate for all groups overwrite both: pass a list, as
            in ``OneCycleLR(optimizer, max_lr=[3.2, 0.05])``.
        layer_decay: As for :func:`param_groups`: the rate of each group, the excluded ones included, is
            multiplied by its ``lr_scale``.
        layer_depth: As for :func:`param_groups`.
        matrix_optimizer: Another optimizer for the matrices of hidden layers, in the form of ``optimizer``,
            with its own learning rate and weight decay: ``functools.partial(torch.optim.Muon, lr=0.02)``.
            ``optimizer`` takes the rest: embeddings, input and output layers, convolutions, and what is
            excluded.
        matrices: With ``matrix_optimizer``, what is a matrix where the rule of :func:`param_groups` does not
            fit, by patterns or by a function.
        **optimizer_kwargs: Passed to ``optimizer``.

    Returns:
        The optimizer that ``optimizer`` returned; with ``matrix_optimizer``, a
        :class:`~lightning_lars.CombinedOptimizer` of it and the one for matrices.

    Raises:
        ValueError: As :func:`param_groups`; if ``excluded_lr`` or ``excluded_lr_scale`` is not above 0, if
            both are given, or if there is no excluded group to apply them to; if the groups of the optimizer
            have no ``lr`` to multiply by ``lr_scale``; if there is no matrix for ``matrix_optimizer``, or
            nothing but matrices.
        TypeError: If ``optimizer`` or ``matrix_optimizer`` is not callable, or does not return an optimizer.

    Example:
        >>> from torch import nn
        >>> from lightning_lars import LARS, build_optimizer
        >>> optimizer = build_optimizer(nn.Linear(4, 2), LARS, lr=3.2, excluded_lr=0.05)
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('adapted', 3.2), ('excluded', 0.05)]

        LARS for the matrix of the hidden layer, AdamW for the head and the biases:

        >>> from functools import partial
        >>> from torch.optim import AdamW
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = build_optimizer(net, AdamW, lr=1e-3, matrix_optimizer=partial(LARS, lr=0.5))
        >>> for group in optimizer.param_groups:
        ...     print(group["name"], group["lr"], group["param_names"])
        adapted 0.001 ['2.weight']
        excluded 0.001 ['0.bias', '2.bias']
        matrices 0.5 ['0.weight']
    """
    check_excluded_rate(excluded_lr, excluded_lr_scale)
    check_optimizer("optimizer", optimizer)
    check_matrix_optimizer(matrix_optimizer, matrices)
    groups = param_groups(
        module,
        exclude=exclude,
        exclude_norm=exclude_norm,
        exclude_bias=exclude_bias,
        exclude_gain=exclude_gain,
        prefix=prefix,
        layer_decay=layer_decay,
        layer_depth=layer_depth,
        matrices=False if matrix_optimizer is None else True if matrices is None else matrices,
    )
    built: Optimizer
    if matrix_optimizer is None:
        built = _built("optimizer", optimizer, groups, optimizer_kwargs)
    else:
        rest = [group for group in groups if not is_matrices(group)]
        of_matrices = [group for group in groups if is_matrices(group)]
        _check_both(module, optimizer, rest, matrix_optimizer, of_matrices)
        built = CombinedOptimizer(
            [
                _built("optimizer", optimizer, rest, optimizer_kwargs),
                _built("matrix_optimizer", matrix_optimizer, of_matrices, {}),
            ]
        )
    for group in built.param_groups:
        if isinstance(group.get("lr"), Tensor):
            # A scheduler writes into the tensor of each group: a shared tensor would be scaled twice.
            group["lr"] = group["lr"].clone()
    excluded = [group for group in built.param_groups if is_excluded(group)]
    if layer_decay is not None:
        scale_rates(built.param_groups)
    set_excluded_rate(excluded, excluded_lr, excluded_lr_scale)
    return built


def check_optimizer(argument: str, optimizer: Any) -> None:
    """Raise TypeError unless the value is a class or a callable that may build an optimizer."""
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        raise TypeError(
            f"{argument} must be an optimizer class or a callable that takes parameter groups, such as "
            f"functools.partial(LARS, lr=3.2), got {optimizer!r}"
        )


def check_matrix_optimizer(matrix_optimizer: Any, matrices: Matrices | None) -> None:
    """Raise unless ``matrix_optimizer`` is None or callable, and ``matrices`` is given only with it."""
    if matrix_optimizer is not None:
        check_optimizer("matrix_optimizer", matrix_optimizer)
    elif matrices is not None:
        raise ValueError(f"matrices must be None without matrix_optimizer, got {matrices!r}")
    check_matrices(matrices)


def _built(
    argument: str, optimizer: Callable[..., Optimizer], groups: list[dict[str, Any]], kwargs: dict[str, Any]
) -> Optimizer:
    built = optimizer(groups, **kwargs)
    if not isinstance(built, Optimizer):
        raise TypeError(f"{argument} must return a torch.optim.Optimizer, got {built!r} from {optimizer!r}")
    return built


def _check_both(
    module: nn.Module,
    optimizer: Any,
    rest: Sequence[Any],
    matrix_optimizer: Any,
    of_matrices: Sequence[Any],
) -> None:
    """Raise ValueError if one of the two optimizers would have no parameter."""
    if not of_matrices:
        raise ValueError(
            f"matrix_optimizer must be None where there is no matrix, got {matrix_optimizer!r}: "
            f"{type(module).__name__} has no trained weight of a linear layer or an attention but in its "
            "output. Pass matrices, such as {'projector.*': True}; explain_param_groups(module, "
            "matrices=True) shows what is found"
        )
    if not rest:
        raise ValueError(
            f"optimizer must have parameters to step, got {optimizer!r}, and {type(module).__name__} has "
            f"nothing but matrices: pass {matrix_optimizer!r} as optimizer"
        )
