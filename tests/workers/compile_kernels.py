"""Compile the Triton kernels, all or a ``few``, for a compute capability, and print their instructions."""

import json
import re
import sys

import torch
from triton import language as tl

from benchmarks.absent_gpu import AbsentGPU
from lightning_lars import LAMB, LARS, NovoGrad
from lightning_lars.optim.backends import triton
from lightning_lars.optim.backends.triton_clip import gradient_norms, gradient_squares
from lightning_lars.optim.backends.triton_factors import factors_in_kernel
from lightning_lars.optim.backends.triton_ratio import adapt
from lightning_lars.optim.backends.triton_scalars import count
from lightning_lars.optim.backends.triton_table import CHUNK
from lightning_lars.optim.backends.triton_walk import BLOCK, WARPS, walk
from lightning_lars.optim.state.code_table import CodeTable

INSTRUCTIONS = (
    "ld.global.v4",
    "st.global.v4",
    "ld.global.v2",
    "st.global.v2",
    "ld.global.b32",
    "ld.global.b16",
)
EVERYTHING = {"decoupled_weight_decay": True, "maximize": True, "weight_decay": 0.1}
CASES = {
    "lars gradient": (LARS, {}),
    "lars decayed_gradient": (LARS, {"denominator": "decayed_gradient", "weight_decay": 0.1}),
    "lars momentum": (LARS, {"denominator": "momentum", "nesterov": True, **EVERYTHING}),
    "lars nesterov": (LARS, {"nesterov": True, "lr_in_momentum": True, **EVERYTHING}),
    "lars without momentum": (LARS, {"momentum": 0.0, "weight_decay": 0.1}),
    "lamb": (LAMB, {}),
    "novograd": (NovoGrad, {"weight_decay": 0.1}),
    "lamb everything": (LAMB, {"bias_correction": False, "grad_averaging": False, **EVERYTHING}),
}
RATIOS = {
    "lars": (LARS, {"trust_clip": 0.1}),
    "lars larc": (LARS, {"trust_clip": "larc", "denominator": "decayed_gradient"}),
    "lamb": (LAMB, {}),
    "lamb bounded": (LAMB, {"trust_clip": (0.1, 2.0), "max_weight_norm": 10.0}),
    "novograd": (NovoGrad, {}),
}
HALF = ("lars gradient", "lamb")
FEW = (*HALF, "lars momentum", "novograd")
WHOLE = torch.zeros(64, dtype=torch.int64)
CODES = torch.zeros(64, dtype=torch.uint8)
FLOATS, DOUBLES = torch.zeros(64), torch.zeros(64, dtype=torch.float64)


def counted(kernel) -> tuple[dict[str, int], int]:
    """Return how often a compiled kernel has each instruction, and the size of its machine code."""
    ptx = kernel.asm["ptx"]
    counts = {instruction: len(re.findall(re.escape(instruction), ptx)) for instruction in INSTRUCTIONS}
    return counts, len(kernel.asm["cubin"])


def group_of(algorithm, options: dict[str, object]) -> dict[str, object]:
    """Return a group of an optimizer."""
    return algorithm([torch.nn.Parameter(torch.ones(2))], **options).param_groups[0]


def compiled(algorithm, options: dict[str, object], dtype, mode: str, in_eight_bit: bool = False):
    """Compile the kernel that :class:`~lightning_lars.optim.backends.triton.Triton` launches for a batch."""
    h = algorithm.hyperparameters(group_of(algorithm, options))
    kept, has_ratio = algorithm.used_moments(h), mode != "measure"
    factors = factors_in_kernel(algorithm, has_ratio=has_ratio, is_first=False, h=h)
    table = CodeTable(FLOATS, CODES, cells=1400, first=6729, shift=17)
    tables = (triton.table_argument(table),) * len(kept)
    return walk.warmup(
        *[WHOLE] * 5, FLOATS, DOUBLES, FLOATS if has_ratio else None,
        tuple(factor.number for factor in factors), tuple(tl.constexpr(factor.kind) for factor in factors),
        0.1 if mode == "move" else FLOATS[0], 0.1, FLOATS[0], 64, 64, triton.arguments(h),
        tables if in_eight_bit else (),
        tensor_lr=mode != "move",
        numbers=len(factors) - 1,
        direction=triton.compiled(algorithm.direction),
        denominator_vector=(
            None if algorithm.adapts_direction(h) else triton.compiled(algorithm.denominator_vector)
        ),
        moments=len(kept),
        absent=len(algorithm.moments) - len(kept),
        in_eight_bit=in_eight_bit,
        counts_steps=algorithm.counts_steps,
        dtype=dtype,
        mode=mode,
        decays=h.weight_decay != 0,
        has_scale=mode == "move",
        chunk_size=CHUNK,
        block=CHUNK if in_eight_bit else BLOCK,
        num_warps=WARPS,
        grid=(1,),
    )  # fmt: skip


def adapting(algorithm, options: dict[str, object]):
    """Compile the kernel that reduces norms, and computes the trust ratios of unsharded layers."""
    h = algorithm.hyperparameters(group_of(algorithm, options))
    return adapt.warmup(
        WHOLE, WHOLE, DOUBLES, FLOATS, FLOATS[0], 64, 64, triton.arguments(h),
        tensor_lr=True,
        ratio=None if algorithm.norm_moment else triton.compiled(algorithm.ratio),
        steps_in=4 if algorithm.counts_steps else None,
        rounds=2,
        chunks_at_once=256,
        grid=(1,),
    )  # fmt: skip


if __name__ == "__main__":
    AbsentGPU.install(int(sys.argv[1]))
    results = {}
    for name, (algorithm, options) in CASES.items():
        if name not in FEW and "few" in sys.argv:
            continue
        adapts = algorithm.adapts_direction(algorithm.hyperparameters(group_of(algorithm, options)))
        for mode in ("measure", "move", *(("apply",) if adapts else ())):
            for dtype in (tl.float32, tl.bfloat16) if name in HALF else (tl.float32,):
                results[f"{name} {mode} {dtype}"] = counted(compiled(algorithm, options, dtype, mode))
    for name, mode in (("lars gradient", "move"), ("lamb", "measure"), ("lamb", "move")):
        kernel = compiled(*CASES[name], tl.float32, mode, in_eight_bit=True)
        results[f"{name} {mode} in 8 bits"] = counted(kernel)
    for name, (algorithm, options) in RATIOS.items():
        results[f"{name} ratio"] = counted(adapting(algorithm, options))
    for dtype in (tl.float32, tl.bfloat16):
        kernel = gradient_squares.warmup(
            *[WHOLE] * 4, DOUBLES, 64, dtype, CHUNK, BLOCK, num_warps=WARPS, grid=(1,)
        )
        results[f"gradient squares {dtype}"] = counted(kernel)
    results["gradient ratio"] = counted(gradient_norms.warmup(WHOLE, DOUBLES, DOUBLES, 2, 256, grid=(1,)))
    results["count"] = counted(count.warmup(WHOLE, 4, 64, grid=(1,)))
    print(json.dumps(results))
