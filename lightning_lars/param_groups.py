"""Which layers are adapted and decayed, by module introspection."""

import difflib
import math
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from lightning_lars.optim.arguments import is_number

Predicate = Callable[[str, nn.Parameter, nn.Module], bool]
"""Called with the name of a parameter, the parameter, and the module that owns it."""

Exclusion = type[nn.Module] | Predicate | str
"""A module type, an fnmatch pattern over parameter names, or a predicate."""

# What torch.compile, FSDP1 and activation checkpointing put into the names of what they wrap.
_WRAPPER_PREFIX = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# "Norm" as a word of its own: LayerNorm, RMSNorm2d, batch_norm, BatchNormalization; neither
# NormalizedLinear, nor the reparametrizations WeightNorm and SpectralNorm, which normalize no activation.
_NORM_WORD = re.compile(r"(?<!Weight)(?<!Spectral)(Norm|norm|NORM)(alization)?(?![a-z])")

# What has weights to adapt, whatever its name says of norms: LinearNorm(nn.Linear), or in one piece with a
# norm, LayerNormMLP.
_WEIGHTED = (
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Linear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    _ConvNd,
)
_WEIGHTED_WORD = re.compile(r"Attention|Cell|Conv|Embedding|FFN|FeedForward|GRU|Linear|LSTM|MLP|Mlp|Proj|RNN")


def named_norm(name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
    """Tell whether the owner is a normalization layer by the name of its type.

    A module with submodules that own parameters is a block around a normalization (``PreNormBlock``), not
    one itself; nor is one that the name or the base class calls a linear layer, a convolution and the like.
    """
    called = type(owner).__name__
    if not _NORM_WORD.search(called) or _WEIGHTED_WORD.search(called) or isinstance(owner, _WEIGHTED):
        return False
    return not any(True for child in owner.children() for _ in child.parameters())


# _NormBase is the one ancestor of the batch, sync-batch and instance norms and their lazy forms.
DEFAULT_EXCLUDED: tuple[Exclusion, ...] = (
    _NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
    named_norm,
)


class _Alias(NamedTuple):
    """One way to reach a parameter: tied parameters have several."""

    name: str
    attribute: str
    owner: nn.Module


class Layer(NamedTuple):
    """A parameter, the group that it belongs to if it is trained, and the rule that decided."""

    name: str
    parameter: nn.Parameter
    owner: nn.Module
    group: str
    rule: str


def param_groups(
    module: nn.Module,
    *,
    exclude: Exclusion | Iterable[Exclusion] = DEFAULT_EXCLUDED,
    exclude_bias: bool = True,
) -> list[dict[str, Any]]:
    """Split a module's parameters into those that are adapted and decayed and those that are not.

    The split is by what a parameter is part of, never by its shape.

    Args:
        module: The model, wrapped or not.
        exclude: What is neither adapted nor decayed: module types (with their subclasses), fnmatch
            patterns over parameter names, and predicates ``(name, parameter, owner) -> bool``. Replaces
            the default, every normalization layer; ``(*DEFAULT_EXCLUDED, "*.pos_embed")`` adds to it.
        exclude_bias: Whether biases are excluded too, those of recurrent and attention layers included.

    Returns:
        Up to two groups of ``(name, parameter)`` pairs for any ``torch.optim`` optimizer: ``"adapted"``,
        and ``"excluded"`` with ``layer_adaptation=False, weight_decay=0.0``. Every trainable parameter
        stands in one of them once, a tied one under its first name.

    Raises:
        ValueError: If the module has no trainable parameter, or a pattern matches none of its names.

    Example:
        >>> from torch import nn
        >>> from lightning_lars import param_groups
        >>> for group in param_groups(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))):
        ...     print(group["name"], [name for name, _ in group["params"]])
        adapted ['0.weight']
        excluded ['0.bias', '1.weight', '1.bias']
    """
    layers = classify(module, exclude, exclude_bias)
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
        {"params": named["adapted"], "name": "adapted"},
        {"params": named["excluded"], "name": "excluded", "layer_adaptation": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def explain_param_groups(
    module: nn.Module,
    *,
    exclude: Exclusion | Iterable[Exclusion] = DEFAULT_EXCLUDED,
    exclude_bias: bool = True,
) -> Table:
    """Show where :func:`param_groups` puts every parameter, and why.

    Args:
        module: As for :func:`param_groups`.
        exclude: As for :func:`param_groups`.
        exclude_bias: As for :func:`param_groups`.

    Returns:
        A table to print with rich: name, shape, type of the owning module, group (``"frozen"`` for
        parameters without ``requires_grad``), and the rule that decided.

    Raises:
        ValueError: If a pattern matches no parameter name.

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
    table = Table("Name", "Shape", "Module", "Group", "Rule")
    for layer in classify(module, exclude, exclude_bias):
        shape = "lazy" if is_lazy(layer.parameter) else str(tuple(layer.parameter.shape))
        trained = layer.parameter.requires_grad
        group, rule = (layer.group, layer.rule) if trained else ("frozen", "requires_grad=False")
        style = None if group == "adapted" else "dim"
        table.add_row(layer.name, shape, type(layer.owner).__name__, group, rule, style=style)
    return table


def build_optimizer(
    module: nn.Module,
    optimizer: Callable[..., Optimizer],
    *,
    exclude: Exclusion | Iterable[Exclusion] = DEFAULT_EXCLUDED,
    exclude_bias: bool = True,
    excluded_lr_scale: float = 1.0,
    **optimizer_kwargs: Any,
) -> Optimizer:
    """Build an optimizer over :func:`param_groups`: what a ``configure_optimizers`` calls.

    Args:
        module: As for :func:`param_groups`.
        optimizer: ``LARS``, ``LAMB``, any other ``torch.optim`` class, or a callable that takes the
            groups (and ``optimizer_kwargs``).
        exclude: As for :func:`param_groups`.
        exclude_bias: As for :func:`param_groups`.
        excluded_lr_scale: Factor, above 0, on the learning rate of the excluded group (Barlow Twins:
            0.024). Lost to schedulers that set one rate for all groups, as ``OneCycleLR(max_lr=1.0)`` does.
        **optimizer_kwargs: Handed to ``optimizer``.

    Returns:
        What ``optimizer`` returned.

    Raises:
        ValueError: As :func:`param_groups`; if ``excluded_lr_scale`` is not above 0, or there is no
            excluded group for it to act on.
        TypeError: If ``optimizer`` cannot be called, or what it returns is no optimizer.

    Example:
        >>> from torch import nn
        >>> from lightning_lars import LARS, build_optimizer
        >>> optimizer = build_optimizer(nn.Linear(4, 2), LARS, lr=0.2, excluded_lr_scale=0.5)
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('adapted', 0.2), ('excluded', 0.1)]
    """
    check_excluded_lr_scale(excluded_lr_scale)
    if not callable(optimizer):
        raise TypeError(
            "optimizer must be an optimizer class or a callable that takes parameter groups, "
            f"got {optimizer!r}"
        )
    groups = param_groups(module, exclude=exclude, exclude_bias=exclude_bias)
    built = optimizer(groups, **optimizer_kwargs)
    if not isinstance(built, Optimizer):
        raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {built!r} from {optimizer!r}")
    for group in built.param_groups:
        if isinstance(group["lr"], Tensor):
            # A scheduler writes into the tensor of each group: one that is shared would be scaled twice.
            group["lr"] = group["lr"].clone()
    if excluded_lr_scale != 1.0:
        excluded = [group for group in built.param_groups if group.get("name") == "excluded"]
        if not excluded:
            raise ValueError(
                "excluded_lr_scale must be 1.0 where no parameter is excluded, "
                f"got {excluded_lr_scale!r}, which would have no effect"
            )
        for group in excluded:
            group["lr"] = group["lr"] * excluded_lr_scale
    return built


def check_excluded_lr_scale(excluded_lr_scale: float) -> None:
    """Raise ValueError unless the factor is above 0 and finite."""
    if not is_number(excluded_lr_scale) or not 0 < excluded_lr_scale < math.inf:
        raise ValueError(
            f"excluded_lr_scale must be above 0 and finite, got {excluded_lr_scale!r}: "
            "to keep parameters as they are, use requires_grad_(False)"
        )


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


def classify(module: nn.Module, exclude: Exclusion | Iterable[Exclusion], exclude_bias: bool) -> list[Layer]:
    """Say of every parameter, frozen ones too, whether it is ``"adapted"`` or ``"excluded"``, and why."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {module!r}: pass the model itself")
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        exclude = [exclude]
    exclusions: list[Exclusion] = list(exclude)
    aliases = _aliases(module)
    _check_exclusions(exclusions, [alias.name for named in aliases.values() for alias in named])
    layers = []
    for parameter, named in aliases.items():
        # A tied parameter is excluded where any of its owners would exclude it.
        rules = [rule for alias in named if (rule := _rule(alias, parameter, exclusions, exclude_bias))]
        group, rule = ("excluded", rules[0]) if rules else ("adapted", "")
        layers.append(Layer(named[0].name, parameter, named[0].owner, group, rule))
    return layers


def _aliases(module: nn.Module) -> dict[nn.Parameter, list[_Alias]]:
    aliases: dict[nn.Parameter, list[_Alias]] = {}
    modules = dict(module.named_modules(remove_duplicate=False))
    for path, owner in modules.items():
        for attribute, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            name = _WRAPPER_PREFIX.sub("", f"{path}.{attribute}" if path else attribute)
            if isinstance(owner, ParametrizationList):
                # `fc.parametrizations.weight` holds what the `weight` of `fc` is computed from.
                *parametrized, _, attribute = path.split(".")
                alias = _Alias(name, attribute, modules[".".join(parametrized)])
            else:
                alias = _Alias(name, attribute, owner)
            aliases.setdefault(parameter, []).append(alias)
    return aliases


def _check_exclusions(exclusions: Iterable[Exclusion], names: list[str]) -> None:
    for exclusion in exclusions:
        if isinstance(exclusion, str):
            if not any(fnmatchcase(name, exclusion) for name in names):
                closest = difflib.get_close_matches(exclusion, names, n=3, cutoff=0.0)
                raise ValueError(
                    f"exclude must hold patterns that match a whole parameter name, got {exclusion!r}, which "
                    f"matches none: the closest names are {closest}, and '*' stands for any part of a name"
                )
        elif (
            not callable(exclusion)
            or isinstance(exclusion, nn.Module)
            or (isinstance(exclusion, type) and not issubclass(exclusion, nn.Module))
        ):
            raise TypeError(
                "exclude must hold module types, patterns over parameter names, or predicates "
                f"(name, parameter, owner) -> bool, got {exclusion!r}: a module in it is meant by its type, "
                "or by a pattern such as 'head.*'"
            )


def _rule(
    alias: _Alias, parameter: nn.Parameter, exclusions: Iterable[Exclusion], exclude_bias: bool
) -> str | None:
    """Return what excludes the parameter, in the user's words, or None."""
    for exclusion in exclusions:
        if isinstance(exclusion, str):
            if fnmatchcase(alias.name, exclusion):
                return repr(exclusion)
        elif isinstance(exclusion, type):
            if isinstance(alias.owner, exclusion):
                return exclusion.__name__.removeprefix("_")
        elif exclusion(alias.name, parameter, alias.owner):
            return getattr(exclusion, "__name__", repr(exclusion))
    return "bias" if exclude_bias and _is_bias(alias) else None


def _is_bias(alias: _Alias) -> bool:
    """Tell whether a parameter is added as it is: a table of biases to look up (Swin) is not."""
    recurrent = isinstance(alias.owner, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention)
    return (
        alias.attribute == "bias"
        or alias.attribute.endswith("_bias")
        or (recurrent and alias.attribute.startswith("bias_"))
    )
