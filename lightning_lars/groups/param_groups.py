"""Which layers are adapted and decayed, by module introspection."""

from collections.abc import Callable, Iterable
from typing import Any

from rich.table import Table
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_lars.groups.excluded_rate import check_excluded_rate, is_excluded, set_excluded_rate
from lightning_lars.groups.introspection import Exclusion, classify

EXCLUDED = {"layer_adaptation": False, "weight_decay": 0.0}
"""What a group is given to take steps of plain SGD or Adam, without decay."""


def param_groups(
    module: nn.Module,
    *,
    exclude: Exclusion | Iterable[Exclusion] = (),
    exclude_norm: bool = True,
    exclude_bias: bool = True,
    exclude_gain: bool = True,
    prefix: str = "",
) -> list[dict[str, Any]]:
    """Split a module's parameters into those that are adapted and decayed and those that are not.

    The split is by what a parameter is part of, and by its original shape: the same for a module and for what
    FSDP, FSDP2, tensor parallelism, DDP, Fabric, ``torch.compile`` or activation checkpointing make of it.
    Excluded are

    1. every parameter of a normalization layer: torch's, with their subclasses, and modules that have "norm"
       in the name of their type or keep running statistics;
    2. every bias, those of recurrent and attention layers included, except tables of biases to look up;
    3. every gain: scalars and vectors, whatever they are broadcast along, that are no weights of a linear,
       convolutional, embedding, attention or recurrent layer (layer scale, gates, temperatures, slopes), and
       what a module of another kind broadcasts over the batch, with a first dimension of 1 (class tokens,
       position embeddings);
    4. what the model, or a submodule, lists in ``no_weight_decay()``, by name or by module.

    Args:
        module: The model, wrapped or not.
        exclude: What is neither adapted nor decayed beside these: module types (with their subclasses),
            fnmatch patterns over parameter names, and predicates ``(name, parameter, owner) -> bool``.
        exclude_norm: Whether normalization layers are excluded.
        exclude_bias: Whether biases are excluded, those of normalization layers too.
        exclude_gain: Whether gains are excluded.
        prefix: Stands, with a dot, before the names of parameters and groups, so that an optimizer can have
            the groups of several modules: ``"backbone"``.

    Returns:
        Up to two groups of ``(name, parameter)`` pairs for any ``torch.optim`` optimizer: ``"adapted"``,
        and ``"excluded"`` with ``layer_adaptation=False, weight_decay=0.0``. Every trainable parameter
        stands in one of them once, a tied one under its first name.

    Raises:
        ValueError: If the module has no trainable parameter, a pattern matches none of its names, or a rule
            would need to know of a parameter what cannot be known: the original shape of a lazy one, or what
            one is part of in an exported graph that does not tell.

    Example:
        >>> from torch import nn
        >>> from lightning_lars import param_groups
        >>> for group in param_groups(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))):
        ...     print(group["name"], [name for name, _ in group["params"]])
        adapted ['0.weight']
        excluded ['0.bias', '1.weight', '1.bias']
    """
    prefix = _with_dot(prefix)
    layers = classify(
        module,
        exclude,
        exclude_norm=exclude_norm,
        exclude_bias=exclude_bias,
        exclude_gain=exclude_gain,
        prefix=prefix,
    )
    trained = [layer for layer in layers if layer.parameter.requires_grad]
    named = {
        group: [(layer.name, layer.parameter) for layer in trained if layer.group == group]
        for group in ("adapted", "excluded")
    }
    if not any(named.values()):
        raise ValueError(
            f"module must have at least one parameter with requires_grad=True, got {type(module).__name__} "
            f"with {len(layers)} frozen ones: unfreeze some, or call this where the layers exist already"
        )
    groups: list[dict[str, Any]] = [
        {"params": named["adapted"], "name": f"{prefix}adapted"},
        {"params": named["excluded"], "name": f"{prefix}excluded", **EXCLUDED},
    ]
    return [group for group in groups if group["params"]]


def explain_param_groups(
    module: nn.Module,
    *,
    exclude: Exclusion | Iterable[Exclusion] = (),
    exclude_norm: bool = True,
    exclude_bias: bool = True,
    exclude_gain: bool = True,
    prefix: str = "",
) -> Table:
    """Show where :func:`param_groups` puts every parameter, and why.

    Args:
        module: As for :func:`param_groups`.
        exclude: As for :func:`param_groups`.
        exclude_norm: As for :func:`param_groups`.
        exclude_bias: As for :func:`param_groups`.
        exclude_gain: As for :func:`param_groups`.
        prefix: As for :func:`param_groups`.

    Returns:
        A table to print with rich: name, original shape, type of the owning module, group (``"frozen"`` for
        parameters without ``requires_grad``), and the rule that decided: what makes the module a
        normalization layer, ``bias``, ``gain``, ``no_weight_decay``, or your own.

    Raises:
        ValueError: As :func:`param_groups`, though not for a module without trainable parameters.

    Example:
        >>> import rich
        >>> from torch import nn
        >>> from lightning_lars import explain_param_groups
        >>> rich.print(explain_param_groups(nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))))
        ┏━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━━━┓
        ┃ Name     ┃ Shape  ┃ Module    ┃ Group    ┃ Rule      ┃
        ┡━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━━━┩
        │ 0.weight │ (2, 4) │ Linear    │ adapted  │           │
        │ 0.bias   │ (2,)   │ Linear    │ excluded │ bias      │
        │ 1.weight │ (2,)   │ LayerNorm │ excluded │ LayerNorm │
        │ 1.bias   │ (2,)   │ LayerNorm │ excluded │ LayerNorm │
        └──────────┴────────┴───────────┴──────────┴───────────┘
    """
    prefix = _with_dot(prefix)
    layers = classify(
        module,
        exclude,
        exclude_norm=exclude_norm,
        exclude_bias=exclude_bias,
        exclude_gain=exclude_gain,
        prefix=prefix,
    )
    table = Table("Name", "Shape", "Module", "Group", "Rule")
    for layer in layers:
        shape = "lazy" if is_lazy(layer.parameter) else "(unknown)"
        if layer.shape is not None:
            shape = str(tuple(layer.shape))
        trained = layer.parameter.requires_grad
        group, rule = (prefix + layer.group, layer.rule) if trained else ("frozen", "requires_grad=False")
        style = None if layer.group == "adapted" and trained else "dim"
        table.add_row(layer.name, shape, layer.module, group, rule, style=style)
    return table


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
    **optimizer_kwargs: Any,
) -> Optimizer:
    """Build an optimizer over :func:`param_groups`: what a ``configure_optimizers`` calls.

    Args:
        module: As for :func:`param_groups`.
        optimizer: ``LARS``, ``LAMB``, any other ``torch.optim`` class, or a callable that takes the
            groups (and ``optimizer_kwargs``).
        exclude: As for :func:`param_groups`.
        exclude_norm: As for :func:`param_groups`.
        exclude_bias: As for :func:`param_groups`.
        exclude_gain: As for :func:`param_groups`.
        prefix: As for :func:`param_groups`. More parts join by ``optimizer.add_param_group(group)`` for each
            group of :func:`param_groups`, under another prefix.
        excluded_lr: Learning rate of the excluded group, above 0, whatever ``lr`` is. What is excluded
            takes steps of plain SGD (LARS) or Adam (LAMB), whose rates are far below those of layers with
            trust ratios. Schedules and warmup act on it; ``BatchSizeScaling`` does not, as the group has
            ``batch_size_scaling=False``. None leaves ``lr``.
        excluded_lr_scale: The same as a factor, above 0, on ``lr`` (Barlow Twins: 0.024). Not together with
            ``excluded_lr``. Both are lost to schedulers that set one rate for all groups: pass a list, as in
            ``OneCycleLR(optimizer, max_lr=[3.2, 0.05])``.
        **optimizer_kwargs: Handed to ``optimizer``.

    Returns:
        What ``optimizer`` returned.

    Raises:
        ValueError: As :func:`param_groups`; if ``excluded_lr`` or ``excluded_lr_scale`` is not above 0, if
            both are given, or if there is no excluded group for them to act on.
        TypeError: If ``optimizer`` cannot be called, or what it returns is no optimizer.

    Example:
        >>> from torch import nn
        >>> from lightning_lars import LARS, build_optimizer
        >>> optimizer = build_optimizer(nn.Linear(4, 2), LARS, lr=3.2, excluded_lr=0.05)
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('adapted', 3.2), ('excluded', 0.05)]
    """
    check_excluded_rate(excluded_lr, excluded_lr_scale)
    if not callable(optimizer):
        raise TypeError(
            "optimizer must be an optimizer class or a callable that takes parameter groups, "
            f"got {optimizer!r}"
        )
    groups = param_groups(
        module,
        exclude=exclude,
        exclude_norm=exclude_norm,
        exclude_bias=exclude_bias,
        exclude_gain=exclude_gain,
        prefix=prefix,
    )
    built = optimizer(groups, **optimizer_kwargs)
    if not isinstance(built, Optimizer):
        raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {built!r} from {optimizer!r}")
    for group in built.param_groups:
        if isinstance(group.get("lr"), Tensor):
            # A scheduler writes into the tensor of each group: one that is shared would be scaled twice.
            group["lr"] = group["lr"].clone()
    excluded = [group for group in built.param_groups if is_excluded(group)]
    set_excluded_rate(excluded, excluded_lr, excluded_lr_scale)
    return built


def _with_dot(prefix: str) -> str:
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, got {prefix!r}")
    return f"{prefix}." if prefix and not prefix.endswith(".") else prefix


def check_holds_parameters(optimizer: Optimizer, module: nn.Module) -> None:
    """Raise if an optimizer would train nothing of a module.

    So it is with one that was built before ``configure_model`` or a strategy replaced the parameters.

    Raises:
        ValueError: If no parameter of the optimizer is one of the module.
    """
    of_module = set(module.parameters())
    if not any(p in of_module for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"optimizer must hold parameters of the module, got {type(optimizer).__name__} with none of "
            f"{type(module).__name__}: it was built before they were replaced (configure_model, FSDP2, "
            "tensor parallel). Build it in configure_optimizers, or use LargeBatchCLI, which builds it late"
        )
