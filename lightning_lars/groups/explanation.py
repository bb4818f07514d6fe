"""Shows where every parameter of a module is put, and why."""

from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lars.groups.introspection import Exclusion, classify
from lightning_lars.groups.layer_depth import LayerDepth, check_layer_decay, depths_of, layer_prefix
from lightning_lars.groups.matrices import Matrices, check_matrices, with_matrices
from lightning_lars.groups.param_groups import with_dot


def explain_param_groups(
    module: nn.Module,
    *,
    exclude: Exclusion | Iterable[Exclusion] = (),
    exclude_norm: bool = True,
    exclude_bias: bool = True,
    exclude_gain: bool = True,
    prefix: str = "",
    layer_decay: float | None = None,
    layer_depth: LayerDepth | None = None,
    matrices: bool | Matrices = False,
) -> Table:
    """Show where :func:`param_groups` puts every parameter, and why.

    Args:
        module: As for :func:`param_groups`.
        exclude: As for :func:`param_groups`.
        exclude_norm: As for :func:`param_groups`.
        exclude_bias: As for :func:`param_groups`.
        exclude_gain: As for :func:`param_groups`.
        prefix: As for :func:`param_groups`.
        layer_decay: As for :func:`param_groups`.
        layer_depth: As for :func:`param_groups`.
        matrices: As for :func:`param_groups`.

    Returns:
        A table to print with rich, of name, original shape, class of the owning module, group (``"frozen"``
        for parameters without ``requires_grad``), and the rule that decided: the criterion for a
        normalization layer, ``bias``, ``gain``, ``no_weight_decay``, ``hidden matrix``, or your own. With
        ``layer_decay``, also of ``lr_scale``.

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
    check_layer_decay(layer_decay, layer_depth)
    check_matrices(matrices)
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
    depths = None
    if layer_decay is not None:
        shapes = {layer.parameter: layer.shape for layer in layers}
        depths = depths_of(module, shapes, layer_depth, prefix)
    table = Table("Name", "Shape", "Module", "Group", *(["LR scale"] if depths else []), "Rule")
    for layer in layers:
        shape = "lazy" if is_lazy(layer.parameter) else "(unknown)"
        if layer.shape is not None:
            shape = str(tuple(layer.shape))
        trained = layer.parameter.requires_grad
        group, rule = (prefix + layer.group, layer.rule) if trained else ("frozen", "requires_grad=False")
        scale = []
        if depths is not None and layer_decay is not None:
            depth = depths.ids[layer.parameter]
            group = layer_prefix(prefix, depth) + layer.group if trained else group
            scale = [f"{depths.scale(depth, layer_decay):.4g}"]
        style = None if layer.group != "excluded" and trained else "dim"
        # As text: brackets in names and in patterns are not markup.
        cells = (layer.name, shape, layer.module, group, *scale, rule)
        table.add_row(*map(escape, cells), style=style)
    return table
