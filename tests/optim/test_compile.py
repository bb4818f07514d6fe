"""A compiled step is one graph and gives what the eager step gives."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from lightning_lars import LAMB, LARS
from tests.support.layers import give_gradients, groups, layers, values
from tests.support.releases import has
from tests.support.slow import slow_unless

pytestmark = pytest.mark.skipif(not has("torch>=2.7"), reason="torch 2.6 cannot compile a step")

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


@pytest.mark.parametrize(
    ("optimizer_class", "options", "dtype"),
    [
        # Without options a step compiles less than with them, and LAMB in float32 less than in bfloat16.
        *[slow_unless(i in (1, 2), *case, torch.float32) for i, case in enumerate(OPTIONS)],
        *[slow_unless(i == 4, *OPTIONS[i], torch.bfloat16) for i in (2, 4)],
    ],
    ids=str,
)
def test_a_compiled_step_is_one_graph_equal_to_the_eager_step(optimizer_class, options, dtype):
    eager = steps(optimizer_class, {**options, "fused": False}, None, dtype)
    compiled = steps(optimizer_class, options, "eager", dtype)
    for expected, actual in zip(eager, compiled, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_a_step_keeps_its_trust_ratios_in_a_plain_tuple(optimizer_class):
    # torch 2.11 cannot compile a step that keeps a generic NamedTuple.
    optimizer = optimizer_class(groups(layers()), fused=False)
    give_gradients([p for group in optimizer.param_groups for p in group["params"]], 0)
    optimizer.step()
    assert [type(ratios) for _, ratios in optimizer._last_trust_ratios] == [tuple]


@pytest.mark.parametrize(
    ("optimizer_class", "key", "value"),
    [
        slow_unless(False, LAMB, "betas", lambda number: (0.95 - 0.01 * number, 0.999 - 0.01 * number)),
        (LAMB, "betas", lambda number: (0.1 * number, 0.1 * number)),
        (LARS, "momentum", lambda number: 0.95 - 0.01 * number),
    ],
    ids=["betas", "betas from 0", "momentum"],
)
def test_a_changing_hyperparameter_compiles_two_graphs(optimizer_class, key, value):
    counter = CompileCounter()
    ends = []
    for backend in (counter, None):
        params = layers()
        optimizer = optimizer_class(groups(params), lr=torch.tensor(0.1), fused=False)
        step = torch.compile(optimizer.step, fullgraph=True, backend=backend) if backend else optimizer.step
        for number in range(6):
            for group in optimizer.param_groups:
                group[key] = value(number)
            give_gradients(params.values(), number)
            step()
        ends.append(values(params))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)
    # Two, and one for the first step, which makes the state.
    assert counter.frame_count <= 3


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("optimizer_class", "options"), [OPTIONS[1], OPTIONS[4]])
def test_inductor_gives_the_eager_step_up_to_rounding(optimizer_class, options):
    eager = steps(optimizer_class, options, None, torch.float64)
    compiled = steps(optimizer_class, options, "inductor", torch.float64)
    for expected, actual in zip(eager, compiled, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
