"""What a parameter is part of: a norm, a bias, or a layer to adapt."""

import difflib
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList

Predicate = Callable[[str, nn.Parameter, nn.Module], bool]
"""Called with the name of a parameter, the parameter, and the module that owns it."""

Exclusion = type[nn.Module] | Predicate | str
"""A module type, an fnmatch pattern over parameter names, or a predicate."""

# What torch.compile, FSDP1 and activation checkpointing put into the names of what they wrap.
_WRAPPER_PREFIX = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# "Norm" as a word of its own: LayerNorm, RMSNorm2d, batch_norm, BatchNormalization; neither
# NormalizedLinear, nor the reparametrizations WeightNorm and SpectralNorm, which normalize no activation.
_NORM_WORD = re.compile(r"(?<!Weight)(?<!Spectral)(Norm|norm|NORM)(alization)?(?![a-z])")

# What has weights to adapt, whatever its name says of norms: by its base class, as LinearNorm(nn.Linear), or
# by a word behind the norm.
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
    one itself; nor is one that its base class, or its name behind the norm, calls a linear layer or the like.
    """
    called = type(owner).__name__
    norm = _NORM_WORD.search(called)
    # AttentionNorm is the norm of an attention, LayerNormMLP a norm and an MLP in one piece.
    if norm is None or _WEIGHTED_WORD.search(called, norm.end()) or isinstance(owner, _WEIGHTED):
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
    # "module" is a name of users too: that of DDP goes by its type.
    in_ddp = [
        f"{path}.module." if path else "module."
        for path, owner in modules.items()
        if isinstance(owner, DistributedDataParallel)
    ]
    for path, owner in modules.items():
        for attribute, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{attribute}" if path else attribute
            for prefix in in_ddp:
                if name.startswith(prefix):
                    name = prefix.removesuffix("module.") + name.removeprefix(prefix)
            name = _WRAPPER_PREFIX.sub("", name)
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
