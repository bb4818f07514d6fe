"""The role of a parameter in the module that owns it: norm, bias, gain or weight."""

import math
import re
from typing import NamedTuple

from torch import Size, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_lars.groups.module_kinds import Kind, kinds_of
from lightning_lars.groups.parameter_names import Alias

# _NormBase is the common base class of the batch, sync-batch and instance norms and their lazy variants.
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)

# "Norm" as a separate word: LayerNorm, RMSNorm2d, batch_norm, BatchNormalization; neither
# NormalizedLinear, nor the reparametrizations WeightNorm and SpectralNorm, which normalize no activation.
_NORM_WORD = re.compile(r"(?<!Weight)(?<!Spectral)(Norm|norm|NORM)(alization)?(?![a-z])")

# Layers with weights to adapt, by base class, or by a word in the class name.
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
_WEIGHTED_WORD = re.compile(
    r"Attention|Attn|Cell|Classifier|Conv|Dense|Embedding|Expert|FFN|FeedForward|GRU|(?<!Per)Head|Linear|LSTM|"
    r"MLP|Mlp|Proj|RNN|Router"
)

# The weights of these layers in torch, also as split by weight_norm and spectral_norm, except for the lengths
# of rows, which act as gains.
_WEIGHT = re.compile(r"((in|[qkv])_proj_)?weight(_(ih|hh|hr)(_l\d+)?(_reverse)?)?(_v|_orig)?")
_LENGTH = re.compile(r".*weight.*_g")
_WEIGHT_WORD = re.compile(r"(.*_)?weights?")
# A lookup table of biases is no bias, nor is a parameter that computes or scales one.
_NO_BIAS = {
    "embed",
    "embedding",
    "embeddings",
    "index",
    "mlp",
    "scale",
    "table",
    "tables",
    "weight",
    "weights",
}
# Gains of several heads or branches, and tokens, may be stacked in a matrix: only their names tell.
_GAIN_WORDS = {
    "alpha",
    "gain",
    "gains",
    "gamma",
    "magnitude",
    "point",
    "scale",
    "scales",
    "shift",
    "size",
    "temperature",
    "token",
    "tokens",
}
# Only tables indexed by position are lookup tables; others are matrices of what their names say.
_TABLE_WORDS = {"table", "tables"}
_POSITION_WORDS = {"bias", "pos", "position", "rel", "relative"}


class Place(NamedTuple):
    """One occurrence of a parameter in a model: tied parameters have several."""

    alias: Alias
    kind: Kind
    """Class of its owner."""

    def norm(self) -> str:
        """Return the criterion by which the owner is a normalization layer, or ""."""
        for norm in NORMS:
            if self.kind.is_a(norm):
                return norm.__name__.removeprefix("_")
        if _is_norm_by_name(self.alias.owner, self.kind):
            return named_norm.__name__
        return running_statistics.__name__ if _keeps_statistics(self.alias.owner, self.kind) else ""

    def is_bias(self, shape: Size | None) -> bool:
        """Return whether the parameter is a bias, including an attention's own ``pos_bias_u``."""
        words = _words(self.alias.attribute)
        if "bias" not in words or _NO_BIAS & set(words[words.index("bias") :]):
            return False
        # A relative bias added to attention directly would have dimensions for head, query and key.
        return not (_is_matrix(shape) and (set(words) & {"rel", "relative"} or "Embedding" in self.kind.name))

    def is_gain(self, shape: Size | None) -> bool | None:
        """Return whether the parameter scales or shifts activations, or replaces an input.

        Gains are scalars, vectors whichever dimensions they are broadcast along, parameters broadcast over
        the batch, and matrices of gains or tokens by name; never the weights of a layer, even with an input
        or output of size 1.

        Args:
            shape: Shape of the whole parameter, or None if unknown.

        Returns:
            None where the answer depends on an unknown shape.
        """
        attribute, weighted = self.alias.attribute, self.kind.is_a(*_WEIGHTED)
        words = _words(attribute)
        if weighted and _LENGTH.fullmatch(attribute):
            return True
        is_table = bool(_TABLE_WORDS & set(words) and _POSITION_WORDS & set(words))
        if is_table or (weighted and _WEIGHT.fullmatch(attribute)):
            return False
        if shape is None:
            return None
        is_vector = sum(size > 1 for size in shape) <= 1
        # By class name alone: the class is the user's, or unknown if it was scripted or exported elsewhere.
        weighted_by_name = _WEIGHTED_WORD.search(self.kind.name) or self.kind.known is None
        if weighted_by_name and _WEIGHT_WORD.fullmatch(attribute) and (len(shape) == 2 or not is_vector):
            return False
        last = next((word for word in reversed(words) if word not in _TABLE_WORDS), "")
        if weighted:
            # A parameter that a subclass adds. With two dimensions, it may be a factor of rank 1 (LoRA).
            is_factor = len(shape) == 2 and math.prod(shape) > 1
            return last in _GAIN_WORDS or (is_vector and not is_factor)
        return is_vector or shape[0] == 1 or last in _GAIN_WORDS


def named_norm(name: str, parameter: Tensor, owner: nn.Module) -> bool:
    """Return whether the owner is a normalization layer by its class name.

    A module with submodules that own parameters is a block around a normalization (``PreNormBlock``), not
    one itself; nor is a class that derives from a weighted layer, or that names one after "norm".
    """
    return _is_norm_by_name(owner, kinds_of(owner)[owner])


def running_statistics(name: str, parameter: Tensor, owner: nn.Module) -> bool:
    """Return whether the owner is a normalization layer because it keeps running statistics."""
    return _keeps_statistics(owner, kinds_of(owner)[owner])


def _words(attribute: str) -> list[str]:
    """Return the words of a name: ``cls_token``, ``gamma_1``."""
    return re.sub(r"_?\d+$", "", attribute.lower()).split("_")


def _is_matrix(shape: Size | None) -> bool:
    return shape is not None and len(shape) == 2 and min(shape) > 1


def _is_norm_by_name(owner: nn.Module, kind: Kind) -> bool:
    norm = _NORM_WORD.search(kind.name)
    # AttentionNorm is the norm of an attention, LayerNormMLP a fused norm and MLP.
    if norm is None or _WEIGHTED_WORD.search(kind.name, norm.end()) or kind.is_a(*_WEIGHTED):
        return False
    return not _is_block(owner)


def _keeps_statistics(owner: nn.Module, kind: Kind) -> bool:
    kept = {name for name, _ in owner.named_buffers(recurse=False)}
    if not kept & {"running_mean", "running_var", "running_std"}:
        return False
    return not (_WEIGHTED_WORD.search(kind.name) or kind.is_a(*_WEIGHTED) or _is_block(owner))


def _is_block(owner: nn.Module) -> bool:
    return any(
        True
        for name, child in owner.named_children()
        if name != "parametrizations" and not isinstance(child, nn.ParameterList | nn.ParameterDict)
        for _ in child.parameters()
    )
