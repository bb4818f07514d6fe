"""Compile the kernels in Triton for a GPU of a compute capability, and print what of."""

import json
import re
import sys

import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_lars.optim.backends.triton_lamb import _lamb
from lightning_lars.optim.backends.triton_lars import _descend, _measure
from lightning_lars.optim.backends.triton_layers import BLOCK, _norms
from lightning_lars.optim.backends.triton_table import CHUNK

INTEGERS = ("layers", "chunks")
TABLES = ("columns", "sizes", "layer_of_chunk", "offset_of_chunk", "first_chunk")
ARRAYS = ("norms", "ratios", "lr", "gradient_scale")
INSTRUCTIONS = ("ld.global.v4", "st.global.v4", "ld.global.b32", "ld.global.b16")
PLAIN = {
    "decoupled_weight_decay": False,
    "has_scale": False,
    "maximize": False,
    "chunk_size": CHUNK,
    "block": BLOCK,
}
EVERYTHING = {**PLAIN, "decoupled_weight_decay": True, "has_scale": True, "maximize": True}
MEASURE = {"denominator": "gradient", "nesterov": False}
DESCEND = {
    "has_ratios": True,
    "has_momentum": True,
    "has_moved": False,
    "nesterov": False,
    "lr_in_momentum": False,
}
LAMB = {"advances": True, "measures": False, "has_ratios": False, "bias_correction": True}
KERNELS = {
    "lars measure gradient": (_measure, {**PLAIN, **MEASURE}),
    "lars measure decayed_gradient": (_measure, {**PLAIN, **MEASURE, "denominator": "decayed_gradient"}),
    "lars measure momentum": (
        _measure,
        {**EVERYTHING, **MEASURE, "denominator": "momentum", "nesterov": True},
    ),
    "lars descend": (_descend, {**PLAIN, **DESCEND}),
    "lars descend nesterov": (_descend, {**EVERYTHING, **DESCEND, "nesterov": True, "lr_in_momentum": True}),
    "lars descend moved": (_descend, {**PLAIN, **DESCEND, "has_moved": True, "nesterov": True}),
    "lamb measure": (_lamb, {**PLAIN, **LAMB, "measures": True}),
    "lamb descend": (_lamb, {**PLAIN, **LAMB, "advances": False, "has_ratios": True}),
    "lamb descend excluded": (_lamb, {**EVERYTHING, **LAMB}),
}


def compile_for(target: GPUTarget, kernel, constants: dict[str, object]) -> tuple[dict[str, int], int]:
    """Return how often the kernel has each instruction, and the size of its machine code."""
    signature, aligned = {}, {}
    for number, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS:
            signature[name] = "i32"
        elif name in (*TABLES, *ARRAYS, "sums"):
            signature[name] = "*i64" if name in TABLES else "*fp64" if name == "sums" else "*fp32"
            aligned[(number,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target)
    ptx = compiled.asm["ptx"]
    counts = {instruction: len(re.findall(re.escape(instruction), ptx)) for instruction in INSTRUCTIONS}
    return counts, len(compiled.asm["cubin"])


if __name__ == "__main__":
    gpu = GPUTarget("cuda", int(sys.argv[1]), 32)
    compiled = {
        f"{name} {dtype}": compile_for(gpu, kernel, {"dtype": dtype, **constants})
        for name, (kernel, constants) in KERNELS.items()
        for dtype in (tl.float32, tl.bfloat16)
    }
    compiled["norms"] = compile_for(gpu, _norms, {"rounds": 2, "chunks_at_once": 256})
    print(json.dumps(compiled))
