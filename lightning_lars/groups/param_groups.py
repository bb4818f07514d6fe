"""Builds parameter groups, and optimizers over them, by module introspection."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lightning_lars.groups.introspection import Exclusion, Layer, classify
from lightning_lars.groups.layer_depth import (
    LayerDepth,
    check_layer_decay,
    depths_of,
    layer_prefix,
)
from lightning_lars.groups.matrices import MATRICES, Matrices, check_matrices, with_matrices
from lightning_lars.rules import NON_NEGATIVE, require

EXCLUDED = {"layer_adaptation": False, "weight_decay": 0.0}
"""The group keys for plain SGD or Adam steps without weight decay."""


def param_groups(
    module: nn.Module,
    *,
    exclude: Exclusion | Iterable[Exclusion] = (),
    exclude_norm: bool = True,
    exclude_bias: bool = True,
    exclude_gain: bool = True,
    prefix: str = "",
    layer_decay: float | None = None,
    layer_depth: LayerDepth | None = None,
    lr: float | None = None,
    matrices: bool | Matrices = False,
) -> list[dict[str, Any]]:
    """Split a module's parameters into an adapted and decayed group and one excluded from both.

    The split depends on the module that owns a parameter and on its original shape: it is the same before and
    after wrapping by FSDP, FSDP2, tensor parallelism, DDP, Fabric, ``torch.compile`` or activation
    checkpointing. Excluded are

    1. every parameter of a normalization layer: torch's and their subclasses, and modules that have "norm"
       in their class name or keep running statistics;
    2. every bias, including those of recurrent and attention layers, except lookup tables of biases;
    3. every gain: scalars and vectors, whichever dimensions they are broadcast along, that are not weights of
       a linear, convolutional, embedding, attention or recurrent layer (layer scale, gates, temperatures,
       slopes), and parameters that other modules broadcast over the batch, with a first dimension of 1 (class
       tokens, position embeddings);
    4. parameters that the model, or a submodule, lists in ``no_weight_decay()``, by name or by module, or has
       marked with ``_no_weight_decay = True`` (Mamba), which FSDP2 and tensor parallelism do not keep.

    Args:
        module: The model, wrapped or not.
        exclude: Further parameters to exclude: module types (with their subclasses), fnmatch patterns over
            parameter names, and predicates ``(name, parameter, owner) -> bool``.
        exclude_norm: Whether normalization layers are excluded.
        exclude_bias: Whether biases are excluded, including those of normalization layers.
        exclude_gain: Whether gains are excluded.
        prefix: Prepended, with a dot, to the names of parameters and groups, so that an optimizer can hold
            the groups of several modules: ``"backbone"``.
        layer_decay: For fine-tuning, the factor, above 0 and at most 1, from the learning rate of each block
            to that of the block before it (BEiT and MAE: 0.65 to 0.75). There are then two groups for each
            layer, ``"layer_3.adapted"`` and ``"layer_3.excluded"``, with
            ``lr_scale = layer_decay ** (n + 1 - layer)`` for n blocks: layer 0 is what the model registers
            before the first block, i + 1 is block i, and n + 1 is what it registers after the last, such as
            the head.
        layer_depth: Where the order of the modules is not the depth, the layers of parameters, by fnmatch
            patterns over their names (``{"head.*": 13}``, the first that matches), or by a function from a
            name to a layer, or to None to leave it to the order. The highest layer has an ``lr_scale`` of 1.
        lr: With ``layer_decay``, the learning rate of the highest layer: the groups have
            ``lr = lr * lr_scale``. Without it they have no ``lr``, for a schedule that multiplies by
            ``lr_scale`` itself, as those of timm, MAE and BEiT do, and torch's and this package's do not.
        matrices: Whether the matrices of hidden layers are in a third group, ``"matrices"``, for an optimizer
            that is made for them, such as ``torch.optim.Muon``: weights with two dimensions, both above 1, of
            linear layers and of attention projections in the model's blocks, or, where these hold none, all
            but the last, which computes the output. Instead, what is a matrix among the adapted parameters,
            by fnmatch patterns over their names (``{"projector.*": True, "blocks.0.*": False}``, the first
            that matches), or by a function from a name to a bool, or to None to leave it to this rule.

    Returns:
        Up to two groups, with ``matrices`` three, with ``layer_decay`` for each layer, of
        ``(name, parameter)`` pairs for any ``torch.optim`` optimizer: ``"adapted"``, and ``"excluded"`` with
        ``layer_adaptation=False, weight_decay=0.0``. Every trainable parameter is in one of them once, a tied
        one under its first name.

    Raises:
        ValueError: If the module has no trainable parameter, a pattern matches none of its names, or a rule
            depends on unknown facts about a parameter: the original shape of a lazy one, or its module in an
            exported graph that does not record it. With ``layer_decay``, if the model has no stack of blocks
            (an ``nn.ModuleList`` or ``nn.Sequential`` with two or more modules of one class), or several.
            With ``matrices``, if a pattern matches no adapted parameter.

    Example:
        >>> from torch import nn
        >>> from lightning_lars import param_groups
        >>> for group in param_groups(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))):
        ...     print(group["name"], [name for name, _ in group["params"]])
        adapted ['0.weight']
        excluded ['0.bias', '1.weight', '1.bias']

        An embedding, two blocks and a head:

        >>> block = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> net = nn.Sequential(nn.Embedding(9, 8), nn.TransformerEncoder(block, 2), nn.Linear(8, 3))
        >>> for group in param_groups(net, layer_decay=0.5, lr=0.8):
        ...     print(group["name"], group["lr_scale"], group["lr"])
        layer_0.adapted 0.125 0.1
        layer_1.adapted 0.25 0.2
        layer_1.excluded 0.25 0.2
        layer_2.adapted 0.5 0.4
        layer_2.excluded 0.5 0.4
        layer_3.adapted 1.0 0.8
        layer_3.excluded 1.0 0.8
    """
    check_layer_decay(layer_decay, layer_depth)
    check_matrices(matrices)
    if lr is not None:
        NON_NEGATIVE.check("lr", lr)
        require("lr", "None without layer_decay: pass it to the optimizer", lr, layer_decay is not None)
    prefix = with_dot(prefix)
    layers = classify(
        module,
        exclude,
        exclude_norm=exclude_norm,
        exclude_bias=exclude_bias,
        exclude_gain=exclude_gain,
        prefix=prefix,
    )
    layers = with_matrices(module, layers, matrices, prefix)
    trained = [layer for layer in layers if layer.parameter.requires_grad]
    if not trained:
        raise ValueError(
            f"module must have at least one parameter with requires_grad=True, got {type(module).__name__} "
            f"with {len(layers)} frozen ones: unfreeze some, or call this after the layers were created"
        )
    if layer_decay is None:
        return _groups_of(trained, prefix)
    shapes = {layer.parameter: layer.shape for layer in layers}
    depths = depths_of(module, shapes, layer_depth, prefix)
    groups: list[dict[str, Any]] = []
    for depth in sorted({depths.ids[layer.parameter] for layer in trained}):
        at_depth = [layer for layer in trained if depths.ids[layer.parameter] == depth]
        scale = depths.scale(depth, layer_decay)
        rate = {"lr_scale": scale} if lr is None else {"lr_scale": scale, "lr": lr * scale}
        groups += [{**group, **rate} for group in _groups_of(at_depth, layer_prefix(prefix, depth))]
    return groups


def _groups_of(layers: Sequence[Layer], prefix: str) -> list[dict[str, Any]]:
    """Return the groups of these layers, without empty ones."""
    named = {
        group: [(layer.name, layer.parameter) for layer in layers if layer.group == group]
        for group in ("adapted", "excluded", MATRICES)
    }
    groups: list[dict[str, Any]] = [
        {"params": named["adapted"], "name": f"{prefix}adapted"},
        {"params": named["excluded"], "name": f"{prefix}excluded", **EXCLUDED},
        {"params": named[MATRICES], "name": f"{prefix}{MATRICES}"},
    ]
    return [group for group in groups if group["params"]]


def with_dot(prefix: str) -> str:
    """Return a prefix of names with a dot at its end, where it is not empty."""
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, got {prefix!r}")
    return f"{prefix}." if prefix and not prefix.endswith(".") else prefix
