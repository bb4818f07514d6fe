"""The phases of ``python -m benchmarks.on_gpu``: what each of its processes does."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks.gpu_timing import capture, clear, host_time, kernels, median_time, steps
from benchmarks.model_shapes import SHAPES, Shape, elements, grouped, parameters
from lightning_lars import LAMB, LARS, LAMB8bit, LARS8bit
from lightning_lars.optim.backends import choice, triton_table

Say = Callable[..., None]
Build = Callable[[list[Parameter]], Optimizer]

ROOT = Path(__file__).parents[1]
TESTS = (
    "test_fused",
    "test_parity",
    "test_triton",
    "test_plan",
    "test_eight_bit_kernels",
    "test_compile",
    "test_memory_of_state",
    "test_cuda_graphs",
)
_OF_KERNELS = "triton or compiles or graph or test_plan or eight_bit_kernels"
_CLIPPED = {"max_grad_norm": 1.0}
_LARS = {"momentum": 0.9, "weight_decay": 1e-4}
_LAMB = {"weight_decay": 0.01}
# One layer of several chunks, one that is cut, one that is whole, a scalar, and one without elements.
_LAYERS: list[Shape] = [(64, 16, 3, 3), (61, 301), (8192,), (), (0, 3)]
# For Triton's interpreter, which takes a second for what a GPU does in a microsecond.
_SMALLEST: list[Shape] = [(16, 16), (3,)]


def has_gpu() -> bool:
    """Return whether there is a GPU."""
    return torch.cuda.is_available()


def shapes_of(model: str) -> list[Shape]:
    """Return the shapes of the layers of a model."""
    return _SMALLEST if model == "smallest" else SHAPES[model]()


def device_of(dry: bool) -> str:
    """Return the device of a phase; in a dry run, make the kernels run on the CPU with small blocks."""
    if dry:
        choice.TRITON_DEVICES.add("cpu")
        _patched(64, 64, 4).__enter__()
    return "cpu" if dry else "cuda"


def canary(say: Say, dry: bool) -> None:
    """Record the environment, the copy bandwidth, and whether the kernels are correct at all."""
    device = device_of(dry)
    say(
        device="CPU" if dry else torch.cuda.get_device_name(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=importlib.import_module("triton").__version__,
        commit=_commit(),
        gcc=shutil.which("gcc") is not None,
    )
    source = torch.ones(2**10 if dry else 2**28, device=device)
    target = torch.empty_like(source)
    time, spread = median_time(lambda: target.copy_(source), 5, 11)
    say(copy_GBs=round(2 * source.nbytes / time / 1e6), spread_ms=spread)
    for optimizer_class in (LARS, LAMB):
        for dtype in (torch.float32, torch.bfloat16):
            ends = [_three_steps(optimizer_class, device, dtype, fused) for fused in (True, False)]
            off = max(
                float(((a - b).abs() / (b.abs() + 1e-2)).max())
                for a, b in zip(*ends, strict=True)
                if a.numel()
            )
            name = str(dtype).removeprefix("torch.")
            say(optimizer=optimizer_class.__name__, dtype=name, off_unfused=off)


def _commit() -> str:
    # A tree that was copied over another checkout is not what its HEAD says.
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _three_steps(
    optimizer_class: type[LARS | LAMB], device: str, dtype: torch.dtype, fused: bool
) -> list[Tensor]:
    params = parameters(_SMALLEST if device == "cpu" else _LAYERS, device, dtype)
    optimizer = _build(optimizer_class, params, fused=fused, weight_decay=0.1)
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        # At an unaligned address.
        memory = params[0].new_empty(params[0].numel() + 1)
        params[0].grad = memory[1:].view_as(params[0]).copy_(params[0].grad)
        optimizer.step()
    return [p.detach().float() for p in params]


def _build(optimizer_class: type[LARS | LAMB], params: list[Parameter], **options: Any) -> LARS | LAMB:
    return optimizer_class(grouped(params), lr=torch.tensor(1e-3, device=params[0].device), **options)


def times(say: Say, dry: bool) -> None:
    """Time steps against torch's fused optimizers and timm's, with one optimizer in memory at a time."""
    device = device_of(dry)
    models = ["smallest"] if dry else ["resnet50", "bert-large", "tiny"]
    for model in models:
        for dtype in ("float32",) if dry or model == "tiny" else ("float32", "bfloat16"):
            for name, build in _candidates(device):
                if model == "tiny" and ("unfused" in name or "timm" in name):
                    continue  # up to a second each
                fact = {
                    "model": model,
                    "dtype": dtype,
                    "optimizer": name,
                    "M": elements(shapes_of(model)) / 1e6,
                }
                params = parameters(shapes_of(model), device, getattr(torch, dtype))
                try:
                    fact |= _time(build(params), 1 if dry else 3 if model == "tiny" else 11)
                except Exception as error:
                    fact["error"] = f"{type(error).__name__}: {error}"[:300]
                say(**fact)
                del params
                clear(device)


def _candidates(device: str) -> Iterator[tuple[str, Build]]:
    """Return the LARS group and then the LAMB group, each starting with its baseline."""
    yield "SGD fused", lambda params: torch.optim.SGD(params, lr=1e-3, fused=True, **_LARS)
    yield "LARS fused", lambda params: _build(LARS, params, fused=True, **_LARS)
    yield "LARS fused, clipped", lambda params: _build(LARS, params, fused=True, **_LARS, **_CLIPPED)
    yield "LARS 8-bit", lambda params: _build(LARS8bit, params, fused=True, **_LARS)
    yield "LARS unfused", lambda params: _build(LARS, params, fused=False, **_LARS)
    yield "timm LARS", lambda params: _timm("Lars")(params, lr=1e-3, **_LARS)
    yield "AdamW fused", lambda params: _adamw(params, device)
    yield "LAMB fused", lambda params: _build(LAMB, params, fused=True, **_LAMB)
    yield "LAMB fused, clipped", lambda params: _build(LAMB, params, fused=True, **_LAMB, **_CLIPPED)
    yield "LAMB 8-bit", lambda params: _build(LAMB8bit, params, fused=True, **_LAMB)
    yield "LAMB unfused", lambda params: _build(LAMB, params, fused=False, **_LAMB)
    yield "timm LAMB", lambda params: _timm("Lamb")(params, lr=1e-3, **_LAMB)


def _adamw(params: list[Parameter], device: str) -> Optimizer:
    on_gpu = device == "cuda"
    lr = torch.tensor(1e-3, device=device) if on_gpu else 1e-3
    return torch.optim.AdamW(params, lr=lr, fused=True, capturable=on_gpu, **_LAMB)


def _timm(name: str) -> Any:
    # Use what is installed: there may be no network.
    return getattr(importlib.import_module("timm.optim"), name)


def _time(optimizer: Optimizer, turns: int) -> dict[str, Any]:
    steps(optimizer.step, 3)
    fact: dict[str, Any] = {}
    eager_steps = 5 if turns > 3 else 1
    fact["eager_ms"], fact["eager_spread"] = median_time(optimizer.step, eager_steps, turns)
    fact["host_us"] = host_time(optimizer.step, turns)
    try:
        replay = capture(optimizer.step)
        fact["graph_ms"], fact["graph_spread"] = median_time(replay, 10, turns)
    except Exception as error:
        fact["not_captured"] = f"{type(error).__name__}: {error}"[:200]
    return fact


def waits(say: Say, dry: bool) -> None:
    """Record whether a step ever synchronizes with the device, and whether graphs match eager steps."""
    device = device_of(dry)
    cases = (
        (LARS, {}),
        (LARS, {"nesterov": True, "weight_decay": 0.1, "max_grad_norm": 1.0, "trust_clip": "larc"}),
        (LARS, {"denominator": "momentum", "weight_decay": 0.1}),
        (LAMB, {}),
        (LAMB, {"max_grad_norm": 1.0, "trust_clip": (0.1, 10.0), "max_weight_norm": 10.0}),
        (LARS8bit, {}),
        (LAMB8bit, {}),
    )
    for optimizer_class, options in cases[-1:] if dry else cases:
        fact: dict[str, Any] = {"optimizer": optimizer_class.__name__, "options": options}
        for key, check in (
            ("waits", _waits),
            ("graph_off", _replays_off),
            ("iteration_off", _iterations_off),
        ):
            try:
                fact[key] = check(optimizer_class, options, device)
            except Exception as error:
                fact[key] = f"{type(error).__name__}: {error}"[:300]
        say(**fact)


def _waits(optimizer_class: type[LARS | LAMB], options: dict[str, Any], device: str) -> bool:
    params = parameters(shapes_of("smallest" if device == "cpu" else "small-cnn"), device)
    optimizer = _build(optimizer_class, params, **options)
    steps(optimizer.step, 2)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
            optimizer.trust_ratios()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return False


def _replays_off(optimizer_class: type[LARS | LAMB], options: dict[str, Any], device: str) -> float:
    """Return how much replays of a captured step, interleaved with eager steps, differ from eager steps."""
    ends = []
    for captures in (True, False):
        params = parameters(shapes_of("smallest" if device == "cpu" else "small-cnn"), device)
        optimizer = _build(optimizer_class, params, **options)
        grads = [p.grad for p in params]
        replay = optimizer.step
        if captures:
            replay = capture(optimizer.step)
        else:
            steps(optimizer.step, 3)
        for number in range(4):
            generator = torch.Generator(device).manual_seed(number)
            for p, grad in zip(params, grads, strict=True):
                assert grad is not None
                grad.normal_(generator=generator)
                # New gradients have new addresses, in a table that the graph does not read.
                p.grad = grad.clone() if number == 1 else grad
            (optimizer.step if number == 1 else replay)()
        ends.append([p.detach().clone() for p in params])
    return max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True))


def _iterations_off(optimizer_class: type[LARS | LAMB], options: dict[str, Any], device: str) -> float:
    """Return the difference between replays of a captured iteration, including gradients, and eager ones."""
    ends = []
    for captures in (True, False):
        torch.manual_seed(0)
        widths = (4, 8, 2) if device == "cpu" else (64, 256, 10)
        linear = [torch.nn.Linear(*pair, device=device) for pair in pairwise(widths)]
        model = torch.nn.Sequential(linear[0], torch.nn.ReLU(), linear[1])
        inputs = torch.randn(32, widths[0], device=device)
        optimizer = _build(optimizer_class, list(model.parameters()), **options)

        def iteration(
            model: torch.nn.Module = model, inputs: Tensor = inputs, optimizer: Optimizer = optimizer
        ) -> None:
            optimizer.zero_grad(set_to_none=True)
            model(inputs).square().mean().backward()
            optimizer.step()

        take = iteration
        if captures:
            take = capture(
                iteration, before=lambda optimizer=optimizer: optimizer.zero_grad(set_to_none=True)
            )
        else:
            steps(iteration, 3)
        for number in range(3):
            inputs.normal_(generator=torch.Generator(device).manual_seed(number))
            take()
        ends.append([p.detach().clone() for p in model.parameters()])
    return max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True))


def tests(say: Say, dry: bool) -> None:
    """Run the tests of the kernels, compiled for the GPU instead of interpreted."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "-rfE"]
    command += ["--tb=line", "-o", "addopts=--import-mode=importlib", "-k", _OF_KERNELS]
    command += ["-n", "8"] if importlib.util.find_spec("xdist") else []
    command += ["--version"] if dry else []
    run = subprocess.run(
        [*command, *(f"tests/optim/{file}.py" for file in TESTS)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = run.stdout.splitlines()
    failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    say(tests=run.returncode, last=lines[-1:], failed=failed[:40], stderr=run.stderr[-500:])


def sweep(say: Say, dry: bool) -> None:
    """Time other sizes of chunks and blocks, and other numbers of warps, by patching the constants."""
    from lightning_lars.optim.backends import triton

    device = device_of(dry)
    models = ["smallest"] if dry else ["resnet50", "bert-large"]
    for chunk, block, warps in ((triton_table.CHUNK, triton.BLOCK, triton.WARPS), *(() if dry else _SWEPT)):
        for model in models:
            for optimizer_class in (LARS, LAMB):
                for dtype in ("float32",) if dry else ("float32", "bfloat16"):
                    params = parameters(shapes_of(model), device, getattr(torch, dtype))
                    with _patched(chunk, block, warps):
                        optimizer = _build(optimizer_class, params, fused=True, weight_decay=1e-4)
                        steps(optimizer.step, 2)
                        of_kernels = kernels(optimizer.step)
                        time, spread = median_time(capture(optimizer.step), 10, 1 if dry else 7)
                    fact = {"model": model, "dtype": dtype, "optimizer": optimizer_class.__name__}
                    fact |= {"chunk": chunk, "block": block, "warps": warps}
                    say(**fact, graph_ms=time, graph_spread=spread, kernels=of_kernels)
                    del optimizer, params
                    clear(device)


_SWEPT = ((2048, 512, 4), (4096, 1024, 8), (8192, 1024, 4))


class _patched:  # noqa: N801
    """Patch the constants of the kernels."""

    def __init__(self, chunk: int, block: int, warps: int) -> None:
        from lightning_lars.optim.backends import triton

        self.patches = [patch.object(module, "CHUNK", chunk) for module in (triton_table, triton)]
        self.patches.append(patch.object(triton, "BLOCK", block))
        self.patches.append(patch.object(triton, "WARPS", warps))

    def __enter__(self) -> None:
        for each in self.patches:
            each.start()

    def __exit__(self, *args: object) -> None:
        for each in self.patches:
            each.stop()


def memcheck(say: Say, dry: bool) -> None:
    """Check for out-of-bounds reads and writes with compute-sanitizer."""
    checker = shutil.which("compute-sanitizer")
    if checker is None and not dry:
        say(memcheck="compute-sanitizer is not installed")
        return
    watched = [] if dry else [checker, "--tool", "memcheck", "--error-exitcode", "9"]
    script = f"from benchmarks.gpu_phases import small_steps; small_steps({device_of(dry)!r})"
    # Without the caching allocator every tensor has a separate allocation, whose bounds are checked.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    command = [*map(str, watched), sys.executable, "-c", script]
    if dry:
        small_steps("cpu")
        say(memcheck=0)
        return
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    say(memcheck=run.returncode, last=(run.stdout + run.stderr).splitlines()[-5:])


def small_steps(device: str) -> None:
    """Take steps of layers with edge cases: ends of chunks, unaligned addresses, no elements."""
    for optimizer_class in (LARS, LAMB):
        for dtype in (torch.float32, torch.bfloat16):
            _three_steps(optimizer_class, device, dtype, True)


def compiled(say: Say, dry: bool) -> None:
    """Time compiled steps; the last phase, because compiling takes long."""
    device = device_of(dry)
    model = "smallest" if dry else "resnet50"
    for optimizer_class in (LARS,) if dry else (LARS, LAMB):
        params = parameters(shapes_of(model), device)
        optimizer = _build(optimizer_class, params, fused=False, weight_decay=1e-4)
        options = {"backend": "eager"} if dry else {}
        fact: dict[str, Any] = {"model": model, "dtype": "float32"}
        fact["optimizer"] = f"{optimizer_class.__name__} compiled"
        try:
            step = torch.compile(optimizer.step, fullgraph=True, **options)
            fact["compile_ms"] = host_time(lambda step=step: steps(step, 3), 1) / 1e3
            fact["eager_ms"], fact["eager_spread"] = median_time(step, 5, 3 if dry else 11)
        except Exception as error:
            fact["error"] = f"{type(error).__name__}: {error}"[:300]
        say(**fact)


PHASES: dict[str, Callable[[Say, bool], None]] = {
    "canary": canary,
    "times": times,
    "waits": waits,
    "tests": tests,
    "sweep": sweep,
    "memcheck": memcheck,
    "compiled": compiled,
}
