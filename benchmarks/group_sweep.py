"""Groups the parameters of published models, and reports where that differs from the models' own lists.

    python -m benchmarks.group_sweep timm
    python -m benchmarks.group_sweep transformers

Builds all architectures of timm on the meta device, or some families of transformers at toy size (with
``--all`` every model that can be built from its configuration alone). Prints how many tensors each rule
excludes; differences from the model's own ``no_weight_decay()`` and the usual "no decay for vectors and
biases", by rule; then suspicious tensors, judged by names and shapes alone, once per kind: an adapted norm,
bias, gain, token or scalar, or an excluded weight.

Needs ``pip install --no-deps timm`` (or transformers) and its dependencies. torchvision, which timm imports
but no architecture needs, is replaced by a stand-in.
"""

import argparse
import contextlib
import fnmatch
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
import types
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import rich
import torch
from rich.table import Table
from torch import nn

from lightning_lars.groups.introspection import Layer, classify

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.MultiheadAttention, nn.RNNBase, nn.Bilinear)


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Provides a module for every name below a missing package, with a class for every attribute."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != self.package:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__dict__["__getattr__"] = _type_called
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


class _Anything(type):
    """The type of a type with every attribute."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def _type_called(name: str) -> type[nn.Module]:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (nn.Module,), {})


@contextlib.contextmanager
def _stand_in(package: str) -> Iterator[None]:
    finder = _StandIn(package)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]


def timm_models(pattern: str, every: bool) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield every architecture of timm."""
    missing = importlib.util.find_spec("torchvision") is None
    with _stand_in("torchvision") if missing else contextlib.nullcontext():
        models = importlib.import_module("timm.models")
    for name in models.list_models(pattern):
        yield name, functools.partial(models.create_model, name)


# Values for small configurations, for the fields that they have; lists keep their length.
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 50, "d_model": 16, "n_embd": 16, "n_layer": 2,
    "n_head": 2, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_ff": 32, "d_kv": 8,
    "num_layers": 2, "num_heads": 2, "depths": [1], "state_size": 4, "image_size": 32, "patch_size": 8,
    "attention_head_size": 8, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = (
    "BartModel", "BeitModel", "BertModel", "CLIPModel", "ConvNextModel", "ConvNextV2Model", "CvtModel",
    "DebertaV2Model", "DeiTModel", "Dinov2Model", "GPT2Model", "Gemma2Model", "HubertModel", "LevitModel",
    "LlamaModel", "Mamba2Model", "MambaModel", "MixtralModel", "MobileBertModel", "PerceiverModel",
    "PoolFormerModel", "Qwen3Model", "ResNetModel", "RwkvModel", "SegformerModel", "SiglipModel", "SwinModel",
    "Swinv2Model", "T5Model", "ViTMAEModel", "ViTModel", "Wav2Vec2ConformerModel", "Wav2Vec2Model",
    "WhisperModel", "XLNetModel",
)  # fmt: skip


def transformers_models(pattern: str, every: bool) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield families of transformers, or all of its models, at toy size."""
    transformers = importlib.import_module("transformers")

    def build(name: str) -> nn.Module:
        model = getattr(transformers, name)
        default = model.config_class()
        small = {}
        for key, value in SMALL.items():
            old = getattr(default, key, None)
            if old is not None and isinstance(old, list | tuple) == isinstance(value, list):
                small[key] = (value * len(old))[: len(old)] if isinstance(value, list) else value
        try:
            return model(model.config_class(**small))
        except Exception:
            return model(default)

    names: Iterable[str] = FAMILIES
    if every:
        auto = importlib.import_module("transformers.models.auto.modeling_auto")
        listed = auto.MODEL_MAPPING_NAMES.values()
        names = sorted({each for name in listed for each in ([name] if isinstance(name, str) else name)})
    for name in fnmatch.filter(names, pattern or "*"):
        yield name, functools.partial(build, name)


def own_no_decay(model: nn.Module, layers: list[Layer]) -> set[str]:
    """Return the names that timm's parameter groups would not decay."""
    listed = set(getattr(model, "no_weight_decay", set)())
    return {
        layer.name
        for layer in layers
        if layer.parameter.ndim <= 1 or layer.name.endswith(".bias") or layer.name in listed
    }


def kind_of(layer: Layer) -> str:
    """Return a description of the kind of a tensor."""
    shape = ["1" if size == 1 else "n" for size in layer.shape or ()]
    return f"{layer.module}.{layer.name.rpartition('.')[2]} ({', '.join(shape)})"


def looks_wrong(layer: Layer) -> str:
    """Return why a tensor seems to be in the wrong group, by names and shapes alone, or ""."""
    name, shape = layer.name.rpartition(".")[2].lower(), layer.shape or ()
    vector = sum(size > 1 for size in shape) <= 1
    weighted = isinstance(layer.owner, WEIGHTED) and "weight" in name and not name.endswith("_g")
    if layer.group == "adapted":
        words = ("norm", "bias", "gamma", "gain", "scale", "token", "alpha", "temperature", "gate")
        if vector and not weighted:
            return "vector or scalar adapted"
        if not weighted and (any(word in name for word in words) or "norm" in layer.module.lower()):
            return "named like a gain, adapted"
        return "first dimension 1, adapted" if not weighted and shape[0] == 1 else ""
    if layer.rule == "no_weight_decay":
        return ""
    if layer.rule == "gain" and not vector:
        return "matrix excluded as a gain"
    if weighted:
        return "weight of a layer excluded"
    return "matrix excluded" if not vector and shape[0] != 1 and math.prod(shape) > 1 else ""


class Found(NamedTuple):
    """Results of a sweep, with the affected architectures."""

    built: list[str]
    failed: dict[str, str]
    rules: Counter[str]
    differs: dict[tuple[str, str], list[str]]
    wrong: dict[tuple[str, str], list[str]]


def sweep(models: Iterable[tuple[str, Callable[[], nn.Module]]]) -> Found:
    """Group the parameters of all models that can be built."""
    found = Found([], {}, Counter(), defaultdict(list), defaultdict(list))
    for name, build in models:
        try:
            with torch.device("meta"):
                model = build()
        except Exception as error:
            found.failed[name] = f"{type(error).__name__}: {str(error)[:80]}"
            continue
        found.built.append(name)
        layers = classify(model)
        no_decay = own_no_decay(model, layers)
        for layer in layers:
            found.rules[f"excluded by {layer.rule}" if layer.rule else "adapted"] += 1
            if (layer.name in no_decay) != (layer.group == "excluded"):
                here = "excluded here, decays" if layer.rule else "adapted here, does not decay"
                by = layer.rule or kind_of(layer)
                found.differs[f"{here} by the model's own groups", by].append(name)
            if reason := looks_wrong(layer):
                found.wrong[reason, kind_of(layer)].append(name)
    return found


def show(title: str, kinds: dict[tuple[str, str], list[str]], most: int) -> None:
    """Print how often each kind occurs, with an example."""
    table = Table("Tensors", "Architectures", "What", "Of", "For example", title=title)
    for key, names in sorted(kinds.items(), key=lambda kind: -len(kind[1]))[:most]:
        table.add_row(str(len(names)), str(len(set(names))), *key, names[0])
    rich.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", choices=("timm", "transformers"))
    parser.add_argument("--pattern", default="", help="architectures to build, as in vit_*")
    parser.add_argument("--all", action="store_true", help="every model of transformers")
    parser.add_argument("--most", type=int, default=80, help="kinds to print in a table")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    listed = {"timm": timm_models, "transformers": transformers_models}[arguments.package]
    found = sweep(listed(arguments.pattern, arguments.all))
    table = Table("Tensors", "Group", title=f"{len(found.built)} architectures of {arguments.package}")
    for rule, count in found.rules.most_common():
        table.add_row(str(count), rule)
    rich.print(table)
    differing = {name for names in found.differs.values() for name in names}
    show(f"{len(differing)} architectures differ from their own groups", found.differs, arguments.most)
    show("Suspicious", found.wrong, arguments.most)
    for name, reason in found.failed.items():
        print(f"{name} could not be built: {reason}")


if __name__ == "__main__":
    main()
