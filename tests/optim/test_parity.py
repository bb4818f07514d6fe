"""LARS and LAMB against the float64 reference, after every step, under all combinations of options."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lars import LAMB, LARS
from lightning_lars.optim.backends import choice
from tests.support import reference
from tests.support.slow import slow_unless

SHAPES = ((), (1,), (7,), (0,), (3, 5), (1, 17), (2, 3, 3, 1), (33,))
LRS = (0.5, 0.0, 2.0, 0.01)


class Layer(NamedTuple):
    """A layer: its shape, how large it starts, and how large its gradient is in each step, if it has one."""

    shape: tuple[int, ...]
    start: float
    layer_adaptation: bool
    gradients: tuple[float | None, ...]


LAYERS = [
    Layer((3, 5), 1.0, True, (1.0, 100.0, 0.01, 1.0)),
    Layer((2, 3, 3, 1), 10.0, True, (None, 1.0, 0.0, 10.0)),
    Layer((7,), 0.0, True, (1.0, None, 1.0, 1.0)),
    Layer((), 1.0, True, (0.0, 0.1, 0.1, 0.1)),
    Layer((33,), 0.0, True, (0.0, 0.0, 1.0, 1.0)),
    Layer((0,), 1.0, True, (1.0, 1.0, 1.0, 1.0)),
    Layer((5, 3), 1.0, False, (1.0, 10.0, 0.01, None)),
    Layer((), 0.0, False, (None, 0.0, 1.0, 1.0)),
]


def lars_sizes(w, g, state, ratio, *, lr, momentum=0.9, weight_decay=0.0, **options):
    """Return |w|, the state and the denominator of the ratio, each as the sum of the norms of its terms."""
    v = momentum * reference.norm(state.get("momentum_buffer", 0.0))
    u = reference.norm(g) + weight_decay * reference.norm(w)
    if options.get("denominator") == "momentum":
        return reference.norm(w) + 2 * lr * ratio * (u + v), {"momentum_buffer": u + v}, 2 * (u + v)
    if options.get("lr_in_momentum"):
        lr, ratio = 1.0, lr * ratio
    v += ratio * u
    return reference.norm(w) + 2 * lr * v, {"momentum_buffer": v}, u


def lamb_sizes(w, g, state, ratio, *, lr, weight_decay=0.01, **options):
    """Return |w|, the state and the denominator of the ratio, each as the sum of the norms of its terms."""
    before = {**state, "exp_avg": np.abs(state.get("exp_avg", 0.0))}
    options |= {"maximize": False, "layer_adaptation": False, "lr": 1.0, "weight_decay": 0.0}
    moved, after, _ = reference.lamb(0.0 * w, np.abs(g), before, **options)
    u = reference.norm(moved) + weight_decay * reference.norm(w)
    return reference.norm(w) + lr * ratio * u, {k: reference.norm(x) for k, x in after.items()}, u


def tensor(values, dtype, device="cpu"):
    return torch.as_tensor(np.asarray(values)).to(device, dtype)


def array(values):
    return values.detach().to("cpu", torch.float64, copy=True).numpy()


def build(optimizer_class, options, layers, dtype, lr_dtype, rng, device):
    """Return the optimizer with an adapted and an excluded group, and the layer of each parameter."""
    groups = {
        adapted: {
            "params": [],
            "layer_adaptation": adapted,
            "weight_decay": share * options.get("weight_decay", 0.02),
            "lr": 1.0 if lr_dtype is None else torch.tensor(1.0, dtype=lr_dtype),
        }
        for adapted, share in ((True, 1.0), (False, 0.5))
    }
    for number, layer in enumerate(layers):
        w = tensor(layer.start * rng.uniform(-1, 1, layer.shape), dtype, device)
        groups[layer.layer_adaptation]["params"].append((f"layer{number}", torch.nn.Parameter(w)))
    optimizer = optimizer_class([group for group in groups.values() if group["params"]], **options)
    params = {n: p for group in groups.values() for n, p in group["params"]}
    return optimizer, {params[f"layer{number}"]: layer for number, layer in enumerate(layers)}


def assert_same_steps(
    optimizer_class,
    options,
    layers=LAYERS,
    *,
    dtype=torch.float64,
    lr_dtype=None,
    seed=0,
    steps=(0, 1, 2, 3),
    device="cpu",
    cuts=False,
):
    """Step optimizer and reference side by side and compare parameters, state and trust ratios.

    In float64 the reference runs freely. In the other dtypes it starts each step from what the optimizer
    holds, so that a difference is the rounding of one step: fewer than 16 times half an eps of float32, of
    the sizes of all terms. A half-precision parameter is rounded once more, by half an eps of its own, or by
    a whole one where that cuts.
    """
    rng = np.random.default_rng(seed)
    step, sizes = STEPS[optimizer_class]
    tolerance = 1e-12 if dtype == torch.float64 else 8 * torch.finfo(torch.float32).eps
    stored = torch.finfo(dtype) if dtype.itemsize == 2 else None
    optimizer, layers = build(optimizer_class, options, layers, dtype, lr_dtype, rng, device)
    options = {key: value for key, value in options.items() if key not in ("max_grad_norm", "fused")}
    expected = {p: (array(p), {}) for p in layers}

    for t in steps:
        lr = LRS[t]
        g, unmoved = {}, {}
        for p, layer in layers.items():
            p.grad, unmoved[p] = None, array(p)
            if layer.gradients[t] is not None:
                p.grad = tensor(layer.gradients[t] * rng.uniform(-1, 1, layer.shape), dtype, device)
                g[p] = array(p.grad)
        for group in optimizer.param_groups:
            group_lr = lr if group["layer_adaptation"] else 0.01 * lr
            group["lr"] = group_lr if lr_dtype is None else group["lr"].fill_(group_lr)
        optimizer.step()

        scale = reference.gradient_scale(g.values(), optimizer.defaults["max_grad_norm"])
        ratios = optimizer.trust_ratios()
        for group in optimizer.param_groups:
            own = {key: group[key] for key in ("weight_decay", "layer_adaptation")}
            own = {**options, **own, "lr": float(group["lr"])}
            for name, p in zip(group["param_names"], group["params"], strict=True):
                w, before = expected[p]
                if p not in g:
                    np.testing.assert_array_equal(array(p), unmoved[p])
                    continue
                after, state, ratio = step(w, scale * g[p], before, **own)
                size, state_sizes, cancelled = sizes(w, scale * g[p], before, ratio, **own)
                own_rounding = 0.0
                if stored:
                    share = 1.0 if cuts else 0.5
                    own_rounding = share * stored.eps * np.abs(after) + stored.smallest_normal * stored.eps
                assert_close(array(p), after, tolerance * size + own_rounding)
                assert set(optimizer.state[p]) == set(state)
                for key, value in state.items():
                    assert optimizer.state[p][key].dtype == state_dtype(key, dtype)
                    assert_close(array(optimizer.state[p][key]), value, tolerance * state_sizes[key])
                if group["layer_adaptation"]:
                    share = share_of_sizes(step, w, scale * g[p], before, own)
                    assert_close(
                        array(ratios.pop(name)), ratio, tolerance * ratio * max(1.0, cancelled * share)
                    )
                if dtype == torch.float64:
                    expected[p] = (after, state)
                else:
                    held = {key: array(value) for key, value in optimizer.state[p].items()}
                    expected[p] = (array(p), held)
        assert ratios == {}


def assert_close(actual, expected, tolerance):
    assert actual.shape == np.shape(expected)
    excess = np.abs(actual - expected) - tolerance
    assert np.all(excess <= 0.0), f"{actual} is off {expected} by {excess} more than {tolerance}"


def state_dtype(key, dtype):
    return torch.float32 if key == "step" or dtype.itemsize == 2 else dtype


def share_of_sizes(step, w, g, state, options):
    """Return 1 / |denominator|: the ratio, bare of coefficient, eps and bounds, over |w|."""
    bare = {"trust_clip": None}
    bare |= {"trust_coefficient": 1.0, "eps": 0.0} if step is reference.lars else {}
    bare |= {"trust_eps": 0.0, "max_weight_norm": None} if step is reference.lamb else {}
    ratio = step(w, g, state, **{**options, **bare})[2]
    return ratio / reference.norm(w) if reference.norm(w) else 0.0


STEPS = {LARS: (reference.lars, lars_sizes), LAMB: (reference.lamb, lamb_sizes)}
LARS_OPTIONS = [
    {},
    {"momentum": 0.0},
    {"weight_decay": 0.1},
    {"dampening": 0.3},
    {"nesterov": True},
    {"trust_coefficient": 0.5},
    {"eps": 1.0},
    {"eps": 0.0},
    {"denominator": "decayed_gradient", "weight_decay": 0.1},
    {"denominator": "momentum", "weight_decay": 0.1},
    {"denominator": "momentum", "weight_decay": 0.1, "momentum": 0.0},
    {"denominator": "momentum", "weight_decay": 0.1, "nesterov": True},
    {"denominator": "momentum", "weight_decay": 0.1, "dampening": 0.3},
    {"trust_clip": 5e-4},
    {"trust_clip": "larc", "trust_coefficient": 0.5},
    {"denominator": "momentum", "trust_clip": 1.0, "eps": 0.0, "trust_coefficient": 0.5},
    {"lr_in_momentum": True, "weight_decay": 0.1},
    {"lr_in_momentum": True, "nesterov": True},
    {"lr_in_momentum": True, "dampening": 0.3},
    {"decoupled_weight_decay": True, "weight_decay": 0.1},
    {"max_grad_norm": 1.0},
    {"max_grad_norm": 1e6},
    {"maximize": True, "weight_decay": 0.1},
    {"maximize": True, "decoupled_weight_decay": True, "weight_decay": 0.1},
]
LAMB_OPTIONS = [
    {},
    {"betas": (0.5, 0.9)},
    {"betas": (0.0, 0.999)},
    {"betas": (0.9, 0.0), "eps": 0.1},
    {"eps": 0.1},
    {"weight_decay": 0.0},
    {"weight_decay": 0.3},
    {"bias_correction": False},
    {"grad_averaging": False},
    {"decoupled_weight_decay": True, "weight_decay": 0.1},
    {"trust_clip": 0.05},
    {"trust_clip": (0.2, 0.4)},
    {"max_weight_norm": 0.5},
    {"trust_eps": 1.0},
    {"max_grad_norm": 1.0},
    {"max_grad_norm": 1e6},
    {"maximize": True, "weight_decay": 0.1},
]
EVERY_KERNEL = {
    LARS: [
        {"momentum": 0.0},
        {"lr_in_momentum": True, "weight_decay": 0.1},
        {"denominator": "momentum", "weight_decay": 0.1, "nesterov": True},
    ],
    LAMB: [{}],
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LR_DTYPES = [None, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", LARS_OPTIONS, ids=str)
def test_lars_follows_the_reference_with_each_option(options, dtype):
    assert_same_steps(LARS, options, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", LAMB_OPTIONS, ids=str)
def test_lamb_follows_the_reference_with_each_option(options, dtype):
    assert_same_steps(LAMB, options, dtype=dtype)


# Numbers that a kernel takes as arguments: whatever they are, it is the same kernel.
NUMBERS = [
    {"trust_coefficient": 0.5},
    {"eps": 1.0},
    {"max_grad_norm": 1e6},
    {"betas": (0.5, 0.9)},
    {"eps": 0.1},
    {"weight_decay": 0.3},
    {"trust_eps": 1.0},
]
IN_TRITON = [
    # What half precision changes in a kernel, no option does.
    slow_unless(
        options in EVERY_KERNEL[optimizer_class] or (dtype == torch.float32 and options not in NUMBERS),
        optimizer_class,
        options,
        dtype,
    )
    for optimizer_class, each in ((LARS, LARS_OPTIONS), (LAMB, LAMB_OPTIONS))
    for options in each
    for dtype in DTYPES[1:]
]


# Triton's interpreter is numpy, which warns of what is not finite, and cuts to bfloat16 where a GPU rounds.
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("optimizer_class", "options", "dtype"), IN_TRITON, ids=str)
def test_the_triton_kernel_follows_the_reference_with_each_option(
    optimizer_class, options, dtype, monkeypatch
):
    pytest.importorskip("triton", minversion="3.3", reason="there is no triton for this system")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(choice, "TRITON_DEVICES", {device})
    cuts = dtype == torch.bfloat16
    is_of_a_kernel = options in EVERY_KERNEL[optimizer_class]
    options = {**options, "fused": True}
    if device == "cuda":
        assert_same_steps(optimizer_class, options, dtype=dtype, device=device)
        return
    # The interpreter takes its time for every layer and step. Every kernel has all steps, one of them at a
    # rate of 0; an option without a kernel of its own has a first step and another.
    layers = [LAYERS[i] for i in (0, 1, 2, 6)]
    steps = (0, 1, 2, 3) if is_of_a_kernel else (0, 2)
    assert_same_steps(optimizer_class, options, layers, dtype=dtype, steps=steps, cuts=cuts)


@pytest.mark.parametrize("lr_dtype", LR_DTYPES[1:], ids=str)
@pytest.mark.parametrize("options", LARS_OPTIONS, ids=str)
def test_lars_follows_the_reference_with_a_tensor_lr(options, lr_dtype):
    assert_same_steps(LARS, options, lr_dtype=lr_dtype)


@pytest.mark.parametrize("lr_dtype", LR_DTYPES[1:], ids=str)
@pytest.mark.parametrize("options", LAMB_OPTIONS, ids=str)
def test_lamb_follows_the_reference_with_a_tensor_lr(options, lr_dtype):
    assert_same_steps(LAMB, options, lr_dtype=lr_dtype)


def some(**choices):
    """Draw a value for some of the options; the others keep their defaults."""
    return st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in choices.items()})


def possible(options):
    """Drop what has no meaning beside the other options and is refused."""
    refused = set()
    if options.get("momentum") == 0.0:
        refused = {"dampening", "nesterov", "lr_in_momentum"}
    elif options.get("denominator") == "momentum":
        refused = {"lr_in_momentum"}
    return {key: value for key, value in options.items() if key not in refused}


lars_options = some(
    momentum=[0.0, 0.5, 0.9],
    weight_decay=[0.0, 0.01, 0.3],
    dampening=[0.0, 0.2],
    nesterov=[False, True],
    trust_coefficient=[1e-3, 0.02, 1.0],
    eps=[0.0, 1e-8, 0.1],
    denominator=["gradient", "decayed_gradient", "momentum"],
    trust_clip=[None, 1e-3, 0.5, "larc"],
    lr_in_momentum=[False, True],
    decoupled_weight_decay=[False, True],
    max_grad_norm=[None, 1e-3, 1.0, 1e6],
    maximize=[False, True],
).map(possible)
lamb_options = some(
    betas=[(0.0, 0.999), (0.5, 0.9), (0.9, 0.99), (0.9, 0.999)],
    eps=[1e-8, 1e-6, 0.01],
    weight_decay=[0.0, 0.01, 0.3],
    bias_correction=[False, True],
    grad_averaging=[False, True],
    decoupled_weight_decay=[False, True],
    trust_clip=[None, 0.1, 10.0, (0.01, 10.0), (0.5, 0.5)],
    max_weight_norm=[None, 0.1, 10.0],
    trust_eps=[0.0, 1e-6, 0.1],
    max_grad_norm=[None, 1e-3, 1.0, 1e6],
    maximize=[False, True],
)


@st.composite
def runs(draw, options):
    """Draw options, layers, dtypes and a seed."""
    dtype = draw(st.sampled_from(DTYPES))
    # float16 ends at 65504, which momentum on gradients of 1e4 passes within a few steps.
    largest = 2 if dtype == torch.float16 else 4
    gradient = st.one_of(st.none(), st.just(0.0), st.integers(-4, largest).map(lambda n: 10.0**n))
    layer = st.builds(
        Layer,
        st.sampled_from(SHAPES),
        st.sampled_from([0.0, 1e-2, 1.0, 10.0]),
        st.booleans(),
        st.tuples(*[gradient] * len(LRS)),
    )
    return {
        "options": draw(options),
        "layers": draw(st.lists(layer, min_size=1, max_size=5)),
        "dtype": dtype,
        "lr_dtype": draw(st.sampled_from(LR_DTYPES)),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@pytest.mark.parametrize("examples", [75, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_a_step_follows_the_reference_under_all_options_at_once(optimizer_class, examples):
    options = lars_options if optimizer_class is LARS else lamb_options

    @settings(derandomize=True, database=None, deadline=None, max_examples=examples)
    @given(runs(options))
    def follows(run):
        assert_same_steps(optimizer_class, **run)

    follows()
