"""The parameter groups of a module's optimizers, and what is unusual in them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lars.advice.parts import ParameterGroup
from lightning_lars.combined.combined_optimizer import parts_of
from lightning_lars.groups.contents import FROZEN, LOST, entries_of, groups_by_name
from lightning_lars.groups.excluded_rate import is_excluded
from lightning_lars.groups.introspection import Layer, classify
from lightning_lars.groups.scheduled_rates import peak
from lightning_lars.optim.layerwise import LayerwiseOptimizer
from lightning_lars.rules import counted
from lightning_lars.sharding.shards import is_distributed
from lightning_lars.trust_ratios.alerts import LONG_WAY, NEGLIGIBLE
from lightning_lars.trust_ratios.excluded_rate_peak import GOOD, SELDOM_ABOVE, excluded_as

_Groups = Sequence[tuple[dict[str, Any], float | None]]
_Layers = Mapping[Tensor, Layer]

LARGE_SHARE = 0.1
"""The share of excluded elements above which it is unusual: norms and biases are a few percent."""


def peak_rates(optimizers: Sequence[Any], schedulers: Mapping[Any, Sequence[Any]]) -> list[float | None]:
    """Return the highest learning rate of every group under its schedulers, None where it has none.

    Args:
        optimizers: The optimizers.
        schedulers: The schedulers of each.
    """
    return [
        peak(schedulers.get(optimizer, ()), group, index) if "lr" in group else None
        for optimizer in optimizers
        for index, group in enumerate(optimizer.param_groups)
    ]


def overview(
    module: nn.Module, optimizers: Sequence[Any], rates: Sequence[float | None]
) -> tuple[ParameterGroup, ...]:
    """Return the groups of the optimizers, then the parameters in none and the frozen ones."""
    groups = groups_by_name(optimizers)
    rate_of = dict(zip(groups, rates, strict=True))
    # Other optimizers keep the key of param_groups, and make no use of it.
    adapting = [each for each in parts_of(optimizers) if isinstance(each, LayerwiseOptimizer)]
    layerwise = [id(group) for each in adapting for group in each.param_groups]
    tensors, elements = Counter[str](), Counter[str]()
    for entry in entries_of(module, groups):
        tensors[entry.group] += 1
        elements[entry.group] += entry.elements
    return tuple(
        ParameterGroup(
            name=name,
            tensors=tensors[name],
            elements=elements[name],
            lr=rate_of.get(name),
            weight_decay=_number(groups.get(name, {}).get("weight_decay")),
            layer_adaptation=groups[name]["layer_adaptation"] if id(groups.get(name)) in layerwise else None,
        )
        for name in (*groups, LOST, FROZEN)
        if name in groups or tensors[name]
    )


def main_group(groups: Sequence[ParameterGroup]) -> ParameterGroup | None:
    """Return the largest group with a learning rate, an excluded one only if there is no other."""
    with_rate = [group for group in groups if group.lr is not None]
    return max(
        with_rate,
        key=lambda group: (not is_excluded({"name": group.name}), group.elements),
        default=None,
    )


def unusual(
    module: nn.Module, optimizers: Sequence[Any], rates: Sequence[float | None], steps: float
) -> tuple[str, ...]:
    """Describe what is unusual in the groups of the optimizers, in sentences.

    Args:
        module: The module.
        optimizers: Its optimizers, before the first step.
        rates: From :func:`peak_rates`.
        steps: Optimizer steps of the whole run; infinite if that is unknown.
    """
    layers: _Layers = {layer.parameter: layer for layer in classify(module, strict=False)}
    held = {p for each in optimizers for group in each.param_groups for p in group["params"]}
    lost = [layer.name for p, layer in layers.items() if p.requires_grad and p not in held]
    sentences = []
    if lost:
        sentences.append(
            f"{counted(len(lost), 'parameter')} with requires_grad=True in no optimizer{_among(lost)}: "
            "pass them to one in configure_optimizers, or freeze them with requires_grad_(False)."
        )
    remaining = iter(rates)
    for optimizer in parts_of(optimizers):
        with_rates = [(group, next(remaining)) for group in optimizer.param_groups]
        named = type(optimizer).__name__
        if isinstance(optimizer, LayerwiseOptimizer):
            sentences += _of_layerwise(named, with_rates, layers, steps)
        else:
            sentences += _of_others(named, with_rates, layers)
    return tuple(sentences)


def _of_layerwise(optimizer: str, groups: _Groups, layers: _Layers, steps: float) -> Iterator[str]:
    adapted = [p for group, _ in groups if group["layer_adaptation"] for p in group["params"]]
    excluded = [p for group, _ in groups if not group["layer_adaptation"] for p in group["params"]]
    kind = excluded_as(groups[0][0])
    if not adapted:
        yield f"{optimizer} adapts no layer: without layer adaptation it is plain {kind}."
        return
    small = [name for p in adapted if (name := _name_if(p, layers, "excluded"))]
    if small:
        decaying = [p for g, _ in groups if g["layer_adaptation"] and g["weight_decay"] for p in g["params"]]
        are_decayed = any(_name_if(p, layers, "excluded") for p in decaying)
        nothing = "" if excluded else "nothing is excluded, so that "
        yield (
            f"{optimizer}: {nothing}norms, biases and gains are adapted, {len(small)} of "
            f"them{_among(small)}, whose steps a trust ratio makes "
            f"multiplicative{', and decayed' if are_decayed else ''}: build the optimizer over "
            "param_groups(module), or add the callback ExcludeNormAndBias."
        )
    tables = [layers[p].name for p in adapted if p in layers and _is_table(layers[p].owner)]
    if tables:
        yield (
            f"{optimizer} adapts embedding tables{_among(tables)}: one trust ratio for all rows, of which a "
            "batch touches few. Published recipes of LAMB do so; exclude=(torch.nn.Embedding,) does not."
        )
    zeros = [name for p in adapted if (name := _name_if(p, layers, "adapted")) and _is_zero(p)]
    if zeros:
        yield (
            f"{optimizer} adapts {counted(len(zeros), 'layer')} of weights that are all 0{_among(zeros)}: "
            "the trust ratio is 1 until they have moved, whatever that of the others is. Exclude them, or "
            "initialize them with small numbers."
        )
    share = _elements(excluded) / max(1, _elements(adapted) + _elements(excluded))
    if share > LARGE_SHARE:
        by_size = sorted((p for p in excluded if p in layers), key=lambda p: -p.numel())
        yield (
            f"{share:.0%} of the elements are excluded from layer adaptation, and take plain {kind} steps; "
            f"norms and biases are a few percent. The largest are {[layers[p].name for p in by_size[:3]]}."
        )
    limit, (good, published) = SELDOM_ABOVE[kind], GOOD[kind]
    too_fast = [rate for group, rate in groups if not group["layer_adaptation"] and rate and group["params"]]
    if too_fast and max(too_fast) > limit * (1 + 1e-6):
        yield (
            f"{optimizer} moves excluded parameters at a learning rate of {max(too_fast):.4g}. That is plain "
            f"{kind}, which rarely trains above {limit:g}{published}: set a separate rate, for example "
            f"excluded_lr={good}."
        )
    moved = [
        group["trust_coefficient"] * rate
        for group, rate in groups
        if group["layer_adaptation"] and "trust_coefficient" in group and rate
    ]
    if moved and max(moved) < NEGLIGIBLE and max(moved) * steps < LONG_WAY:
        yield (
            f"trust_coefficient * lr is {max(moved):.3g} at its peak, so no layer moves by more than about "
            f"{100 * max(moved):.2g} % of its norm in a step, before momentum: LARS needs a larger learning "
            "rate than SGD, 1 to 10 and more with trust_coefficient=1e-3."
        )


def _of_others(optimizer: str, groups: _Groups, layers: _Layers) -> Iterator[str]:
    decayed = [
        name
        for group, _ in groups
        if _number(group.get("weight_decay"))
        for p in group["params"]
        if (name := _name_if(p, layers, "excluded"))
    ]
    if decayed:
        yield (
            f"{optimizer} decays {len(decayed)} norms, biases and gains{_among(decayed)}: "
            f"build_optimizer(module, {optimizer}, ...) leaves them out."
        )
    kind = next((kind for kind in SELDOM_ABOVE if optimizer.startswith(kind)), None)
    rates = [rate for group, rate in groups if rate and group["params"]]
    if kind is not None and rates and max(rates) > SELDOM_ABOVE[kind] * (1 + 1e-6):
        yield (
            f"{optimizer} has a learning rate of {max(rates):.4g}, and rarely trains above "
            f"{SELDOM_ABOVE[kind]:g}."
        )


def _name_if(p: Tensor, layers: _Layers, group: str) -> str:
    """Return the name of a parameter that the rules of ``param_groups`` assign to this group, else ""."""
    return layers[p].name if p in layers and layers[p].group == group else ""


def _is_table(owner: nn.Module) -> bool:
    return isinstance(owner, nn.Embedding | nn.EmbeddingBag)


def _is_zero(p: Tensor) -> bool:
    # Of a shard, the others may differ.
    return not is_lazy(p) and not is_distributed(p) and p.numel() > 0 and not bool(torch.any(p.detach() != 0))


def _elements(params: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in params if not is_lazy(p))


def _among(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
