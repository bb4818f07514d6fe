"""A compiled step is one graph and gives what the eager step gives."""

import shutil

import pytest
import torch

from lightning_lars import LAMB, LARS
from tests.support.layers import give_gradients, groups, layers, values

OPTIONS = [
    (LARS, {}),
    (LARS, {"max_grad_norm": 0.5, "weight_decay": 0.1, "nesterov": True}),
    (LARS, {"denominator": "momentum", "trust_clip": "larc", "decoupled_weight_decay": True}),
    (LAMB, {}),
    (LAMB, {"max_grad_norm": 0.5, "trust_clip": (0.1, 2.0), "max_weight_norm": 1.0}),
]
needs_compiler = pytest.mark.skipif(
    not (shutil.which("gcc") and shutil.which("g++")),
    reason="inductor needs gcc and g++ to build its CPU code",
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def steps(optimizer_class, options, backend, dtype=torch.float32):
    """Yield parameters and trust ratios after each of four steps under a falling tensor lr."""
    params = layers(dtype)
    optimizer = optimizer_class(groups(params), lr=torch.tensor(0.4), **options)
    step = (
        optimizer.step if backend is None else torch.compile(optimizer.step, fullgraph=True, backend=backend)
    )
    for number in range(4):
        for group in optimizer.param_groups:
            group["lr"].fill_(0.4 / (1 + number))
        give_gradients(params.values(), number)
        step()
        yield values(params), {name: ratio.clone() for name, ratio in optimizer.trust_ratios().items()}


@pytest.mark.parametrize(("optimizer_class", "options"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_step_is_one_graph_equal_to_the_eager_step(optimizer_class, options, dtype):
    eager = steps(optimizer_class, {**options, "fused": False}, None, dtype)
    compiled = steps(optimizer_class, options, "eager", dtype)
    for expected, actual in zip(eager, compiled, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("optimizer_class", "options"), [OPTIONS[1], OPTIONS[4]])
def test_inductor_gives_the_eager_step_up_to_rounding(optimizer_class, options):
    eager = steps(optimizer_class, options, None, torch.float64)
    compiled = steps(optimizer_class, options, "inductor", torch.float64)
    for expected, actual in zip(eager, compiled, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
