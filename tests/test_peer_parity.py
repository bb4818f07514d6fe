"""Parity with published implementations: every row of docs/compatibility.md, after every step."""

import ast
import inspect
import re
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.linalg import norm
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer
from torch.testing import assert_close

from lightning_lars import LAMB, LARS, LAMB8bit, LARS8bit, NovoGrad, PercentileGradientClipping
from lightning_lars.gradients.percentile_clipping import PercentileClipping
from tests.support.eight_bit import needs_torchao
from tests.support.peers import PEERS, peer
from tests.support.ranks import RankError, on_ranks
from tests.support.reference import autoclip, percentile_clipping
from tests.workers.bitsandbytes_steps import CASES as BITSANDBYTES_CASES
from tests.workers.bitsandbytes_steps import LAMB_CASES as BITSANDBYTES_LAMB_CASES
from tests.workers.bitsandbytes_steps import LAMB_OPTIONS as BITSANDBYTES_LAMB_OPTIONS
from tests.workers.bitsandbytes_steps import OPTIONS as BITSANDBYTES_OPTIONS
from tests.workers.bitsandbytes_steps import seen as seen_of_bitsandbytes
from tests.workers.bitsandbytes_steps import start as start_of_bitsandbytes
from tests.workers.bitsandbytes_steps import steps

pytestmark = pytest.mark.timeout(180)  # packages are installed

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"

LIGHTLY = "lightly==1.6.0"
OPEN_LARS = "open_lars==0.1.1"
PYTORCH_OPTIMIZER = "pytorch_optimizer==4.1.0"
SOLO_LEARN = "solo-learn==1.0.2"
TIMM = "timm==1.0.31"
TORCH_OPTIMIZER = "torch_optimizer==0.3.0"

SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (6, 5),
    "kernel": (4, 3, 2, 3),
    "odd": (7,),
    "scalar": (),
    "zero_matrix": (5, 4),
    "bias": (6,),
    "zero_bias": (5,),
}
ALL = set(SHAPES)
BIASES = {"bias", "zero_bias"}
VECTORS = {"odd", *BIASES}
VECTORS_AND_SCALARS = {"scalar", *VECTORS}

# What `param_groups` gives its second group, and what most peers do with the layers they leave out.
EXCLUDED = {"layer_adaptation": False, "weight_decay": 0.0}

# On both sides of 1, where LARC's clip turns over, but below it while zero_matrix is zero (note 3).
LEARNING_RATES = (0.2, 0.5, 1.3, 0.9, 0.4, 1.7, 0.7, 0.05, 0.3)
GRADIENT_SIZES = (1.0, 0.3, 3.0, 0.01, 0.1, 10.0, 1.0, 0.003, 1.0)
MOMENTUM = 0.9
WEIGHT_DECAY = 0.05
FOR_LARS = {"lr": 1.0, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
FOR_LAMB = {"lr": 1.0, "weight_decay": WEIGHT_DECAY}

Grads = dict[str, Tensor]
Step = Callable[[float, Grads], dict[str, tuple[Tensor, dict[str, Any]]]]
"""Takes one step with a learning rate and returns the weights and the state of every layer."""


def start(layers: Collection[str] = ALL, dtype: torch.dtype = torch.float64) -> dict[str, Parameter]:
    """Weights with norms on both sides of 10, where some versions of LAMB bound them."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: 2 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {
        name: Parameter(w.to(dtype) * (not name.startswith("zero")))
        for name, w in weights.items()
        if name in layers
    }


def gradients(never_zero: Collection[str] = (), dtype: torch.dtype = torch.float64) -> list[Grads]:
    """Gradients of every step; in the fourth, and in part in the first, zero except in the layers named."""
    generator = torch.Generator().manual_seed(1)
    steps = [
        {name: (size * torch.randn(shape, generator=generator)).to(dtype) for name, shape in SHAPES.items()}
        for size in GRADIENT_SIZES
    ]
    for name in ALL - set(never_zero):
        steps[3][name].zero_()
    for name in BIASES - set(never_zero):  # before there is any momentum
        steps[0][name].zero_()
    steps[0]["zero_matrix"].zero_()  # as its weights
    return steps


def torch_step(
    build: Callable[[list[dict[str, Any]]], Optimizer],
    layers: dict[str, Parameter],
    excluded: Collection[str] = BIASES,
    **options: Any,
) -> Step:
    """Step an optimizer whose second group, of the excluded layers, has options of its own."""
    first = [layer for name, layer in layers.items() if name not in excluded]
    second = [layer for name, layer in layers.items() if name in excluded]
    optimizer = build([{"params": first}, {"params": second, **options}])

    def step(lr: float, grads: Grads) -> dict[str, tuple[Tensor, dict[str, Any]]]:
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, layer in layers.items():
            layer.grad = grads[name].clone()  # some peers write to it
        optimizer.step()
        return {name: (layer.detach(), optimizer.state[layer]) for name, layer in layers.items()}

    return step


def rule_step(rule: Callable[..., Any], excluded: Collection[str] = BIASES, **options: Any) -> Step:
    """Step a rule in numpy, which is told of each layer whether it is adapted."""
    weights = {name: layer.detach().numpy() for name, layer in start().items()}
    states: dict[str, dict[str, Any]] = {name: {} for name in weights}

    def step(lr: float, grads: Grads) -> dict[str, tuple[Tensor, dict[str, Any]]]:
        for name, w in weights.items():
            weights[name] = rule(w, grads[name].numpy(), states[name], lr, name not in excluded, **options)
        return {name: (torch.as_tensor(w), states[name]) for name, w in weights.items()}

    return step


def lars_step(excluded: Collection[str] = BIASES, group: dict[str, Any] = EXCLUDED, **options: Any) -> Step:
    return torch_step(lambda groups: LARS(groups, **FOR_LARS | options), start(), excluded, **group)


def lamb_step(excluded: Collection[str] = BIASES, group: dict[str, Any] = EXCLUDED, **options: Any) -> Step:
    return torch_step(lambda groups: LAMB(groups, **FOR_LAMB | options), start(), excluded, **group)


def assert_same_after_every_step(
    ours: Step,
    theirs: Step,
    *,
    never_zero: Collection[str] = (),
    our_lr: Callable[[int, float], float] = lambda t, lr: lr,
) -> None:
    for t, (lr, grads) in enumerate(zip(LEARNING_RATES, gradients(never_zero), strict=True), start=1):
        their_layers = theirs(lr, grads)
        for name, (w, state) in ours(our_lr(t, lr), grads).items():
            their_w, their_state = their_layers[name]
            where = f"{name} after step {t}: "
            assert_close(w, their_w, atol=1e-12, rtol=1e-12, msg=lambda text, at=where: at + text)
            # Only a few peers count the steps of each layer.
            for key in state.keys() - ({"step"} - their_state.keys()):
                assert_close(
                    torch.as_tensor(state[key], dtype=torch.float64),
                    torch.as_tensor(their_state[key], dtype=torch.float64),
                    atol=1e-12,
                    rtol=1e-12,
                    msg=lambda text, at=where + key: f"{at}: {text}",
                )


def keywords(cell: str) -> dict[str, Any]:
    """Return the arguments in a cell of the page: `nesterov=True, eps=0.0`, or no code for none."""
    code = re.search(r"`([^`]+)`", cell)
    call = ast.parse(f"f({code[1] if code else ''})", mode="eval").body
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def read_rows() -> dict[str, list[Any]]:
    """Return, by test, their arguments and ours in the rows of the page that name a case of that test."""
    rows: dict[str, list[Any]] = {}
    for line in PAGE.read_text().splitlines():
        cells = line.strip("|").split("|")
        named = re.search(r"`(test_\w+)\[(.+)\]`", cells[-1])
        if named:
            arguments = pytest.param(keywords(cells[1]), keywords(cells[2]), id=named[2])
            rows.setdefault(named[1], []).append(arguments)
    return rows


ROWS = read_rows()
"""Rows that no test has taken yet."""


def on_each_row(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test with the arguments, theirs and ours, of each row of the page that names it."""
    return pytest.mark.parametrize(("theirs", "ours"), ROWS.pop(test.__name__))(test)


single_and_foreach = pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])


@single_and_foreach
@on_each_row
def test_lars_reproduces_timm(theirs, ours, foreach):
    timm = peer(TIMM, "timm.optim.lars")
    group = EXCLUDED | {"layer_adaptation": "always_adapt" in theirs}
    assert_same_after_every_step(
        lars_step(group=group, **ours),
        torch_step(lambda g: timm.Lars(g, foreach=foreach, **FOR_LARS | theirs), start(), weight_decay=0.0),
        never_zero=ALL - BIASES,
    )


@pytest.mark.parametrize(
    ("requirement", "module"),
    [(LIGHTLY, "lightly.utils.lars"), (TORCH_OPTIMIZER, "torch_optimizer.lars")],
    ids=["lightly", "torch_optimizer"],
)
@on_each_row
def test_lars_reproduces_the_copies_of_bolts(theirs, ours, requirement, module):
    copy = peer(requirement, module)
    assert_same_after_every_step(
        lars_step(**ours),
        torch_step(lambda g: copy.LARS(g, **FOR_LARS | theirs), start(), weight_decay=0.0),
        never_zero=ALL - BIASES,
    )


@on_each_row
def test_lars_reproduces_the_wrapper_of_solo_learn(theirs, ours):
    solo = peer(SOLO_LEARN, "solo.utils.lars")
    excluded = VECTORS if "exclude_bias_n_norm" in theirs else set()
    assert_same_after_every_step(
        lars_step(excluded, **ours),
        torch_step(lambda g: solo.LARSWrapper(SGD(g, **FOR_LARS), **theirs), start()),
        never_zero=ALL - excluded,
    )


@on_each_row
def test_lars_reproduces_open_lars(theirs, ours):
    open_lars = peer(OPEN_LARS, "open_lars.lars")
    assert_same_after_every_step(
        lars_step(VECTORS_AND_SCALARS, {"layer_adaptation": False}, **ours),
        torch_step(lambda g: open_lars.LARS(g, **FOR_LARS | theirs), start()),
        never_zero=ALL - VECTORS_AND_SCALARS,
    )


@on_each_row
def test_lars_reproduces_minerva(theirs, ours):
    minerva = peer("minerva==0.3.11b0", "minerva.optimizers.lars")
    assert_same_after_every_step(
        lars_step(excluded=(), **ours),
        torch_step(lambda g: minerva.LARS(g, **FOR_LARS | theirs), start()),
    )


@single_and_foreach
@on_each_row
def test_lars_reproduces_pytorch_optimizer(theirs, ours, foreach):
    pytorch_optimizer = peer(PYTORCH_OPTIMIZER, "pytorch_optimizer.optimizer.lars")
    assert_same_after_every_step(
        lars_step(VECTORS_AND_SCALARS, **ours),
        torch_step(lambda g: pytorch_optimizer.LARS(g, foreach=foreach, **FOR_LARS | theirs), start()),
    )


def bitsandbytes_lars() -> type[Optimizer]:
    """Return PytorchLARS as ``python -O`` runs it: it asserts float32, which its rule does not need."""
    module = peer("bitsandbytes==0.50.2", "bitsandbytes.optim.lars")
    code = compile(inspect.getsource(module), module.__file__, "exec", optimize=1)
    exec(code, vars(without_asserts := ModuleType(module.__name__)))
    return without_asserts.PytorchLARS


@on_each_row
def test_lars_reproduces_bitsandbytes(theirs, ours):
    build = bitsandbytes_lars()
    layers = ALL - {"zero_matrix"}  # which never moves there (note 5)
    no_clip = {"max_unorm": 0.0, "weight_decay": 0.0}
    assert_same_after_every_step(
        torch_step(lambda g: LARS(g, **FOR_LARS | ours), start(layers), **EXCLUDED),
        torch_step(lambda g: build(g, **FOR_LARS | theirs), start(layers), **no_clip),
    )


@pytest.fixture(scope="module")
def bitsandbytes():
    """The layer after every step, by class and case, as the installed package moves it."""
    peer("bitsandbytes==0.50.2", "bitsandbytes.optim.lars")  # or the test is skipped
    try:
        (seen,) = on_ranks(1, seen_of_bitsandbytes, str(PEERS / "bitsandbytes-0.50.2"), limit=120)
    except RankError as error:
        pytest.skip(f"bitsandbytes cannot be run: {str(error)[-300:]}")
    return seen


def largest_distance(optimizer, expected, lr_factor=lambda t: 1.0):
    """The farthest from the layers that are expected, as a share of their norms."""
    pairs = zip(steps(optimizer, lr_factor), expected, strict=True)
    return max(((w - other).norm() / other.norm()).item() for w, other in pairs)


def case_of(theirs, cases=BITSANDBYTES_CASES):
    (case,) = (case for case, options in cases.items() if options == theirs)
    return case


@pytest.mark.slow
@on_each_row
@pytest.mark.parametrize("name", ["LARS", "LARS32bit", "PytorchLARS"])
def test_lars_reproduces_the_compiled_classes_of_bitsandbytes(theirs, ours, name, bitsandbytes):
    lars = LARS([Parameter(start_of_bitsandbytes())], **BITSANDBYTES_OPTIONS, **ours)
    assert largest_distance(lars, bitsandbytes[name, case_of(theirs)]) < 1e-6


@pytest.mark.slow
@on_each_row
def test_lars8bit_matches_the_intended_bitsandbytes_rule(theirs, ours, bitsandbytes):
    needs_torchao()
    lars = LARS8bit([Parameter(start_of_bitsandbytes())], **BITSANDBYTES_OPTIONS, **ours)
    expected, broken = (bitsandbytes[each, case_of(theirs)] for each in ("PytorchLARS", "LARS8bit"))
    way = ((expected[-1] - start_of_bitsandbytes()).norm() / expected[-1].norm()).item()
    assert largest_distance(lars, expected) < 0.02 * way
    assert ((broken[-1] - expected[-1]).norm() / expected[-1].norm()).item() > way


def bitsandbytes_lamb_factor(theirs):
    """What the learning rate is multiplied with, by the number of the step (notes 7 and 11)."""
    return lambda t: theirs["max_unorm"] * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)


@pytest.mark.slow
@on_each_row
@pytest.mark.parametrize("name", ["LAMB", "LAMB32bit"])
def test_lamb_reproduces_the_compiled_classes_of_bitsandbytes_given_their_learning_rate(
    theirs, ours, name, bitsandbytes
):
    lamb = LAMB([Parameter(start_of_bitsandbytes())], **BITSANDBYTES_LAMB_OPTIONS, **ours)
    expected = bitsandbytes[name, case_of(theirs, BITSANDBYTES_LAMB_CASES)]
    assert largest_distance(lamb, expected, bitsandbytes_lamb_factor(theirs)) < 1e-6


@pytest.mark.slow
@on_each_row
def test_lamb8bit_matches_the_intended_bitsandbytes_rule(theirs, ours, bitsandbytes):
    needs_torchao()
    lamb = LAMB8bit([Parameter(start_of_bitsandbytes())], **BITSANDBYTES_LAMB_OPTIONS, **ours)
    case = case_of(theirs, BITSANDBYTES_LAMB_CASES)
    expected, broken = (bitsandbytes[each, case] for each in ("LAMB32bit", "LAMB8bit"))
    way = ((expected[-1] - start_of_bitsandbytes()).norm() / expected[-1].norm()).item()
    assert largest_distance(lamb, expected, bitsandbytes_lamb_factor(theirs)) < 0.02 * way
    assert ((broken[-1] - expected[-1]).norm() / expected[-1].norm()).item() > way


def ratio_or_one(eta: float, w: Any, denominator: Any) -> float:
    return eta * norm(w) / norm(denominator) if norm(w) > 0 and norm(denominator) > 0 else 1.0


def barlow_twins(w, g, state, lr, adapted, *, eta=0.001):
    """facebookresearch barlowtwins/main.py; vicreg, moco-v3/moco/optimizer.py and mae/util/lars.py."""
    d = g
    if adapted:
        d = g + WEIGHT_DECAY * w
        d = ratio_or_one(eta, w, d) * d
    mu = state["momentum_buffer"] = MOMENTUM * state.get("momentum_buffer", 0.0) + d
    return w - lr * mu


def vissl(w, g, state, lr, adapted):
    """facebookresearch vissl/optimizers/lars.py, which decays the layers that it does not adapt."""
    return barlow_twins(w, g if adapted else g + WEIGHT_DECAY * w, state, lr, adapted)


def simclr_classic(w, g, state, lr, adapted, *, use_nesterov=False):
    """google-research simclr/lars_optimizer.py, classic_momentum=True; optax/_src/alias.py lars."""
    d = g + WEIGHT_DECAY * w if adapted else g
    scaled_lr = lr * ratio_or_one(0.001, w, d) if adapted else lr
    v = state["momentum_buffer"] = MOMENTUM * state.get("momentum_buffer", 0.0) + scaled_lr * d
    return w - (MOMENTUM * v + scaled_lr * d if use_nesterov else v)


def simclr_popular(w, g, state, lr, adapted, *, use_nesterov=False):
    """google-research simclr/lars_optimizer.py, classic_momentum=False."""
    d = g + WEIGHT_DECAY * w if adapted else g
    v = state["momentum_buffer"] = MOMENTUM * state.get("momentum_buffer", 0.0) + d
    update = MOMENTUM * v + d if use_nesterov else v
    return w - lr * (ratio_or_one(0.001, w, update) if adapted else 1.0) * update


def notebook(w, g, state, lr, adapted):
    """SimCLR's popular form after the decay of AdamW, as notebooks have it."""
    if adapted:
        w = w - lr * WEIGHT_DECAY * w
    v = state["momentum_buffer"] = MOMENTUM * state.get("momentum_buffer", 0.0) + g
    return w - lr * (ratio_or_one(0.001, w, v) if adapted else 1.0) * v


def apex_larc(w, g, state, lr, adapted, *, trust_coefficient=0.02, clip=True):
    """NVIDIA apex/parallel/LARC.py, until its removal in 2025, around torch.optim.SGD; it adapts all."""
    if norm(w) != 0 and norm(g) != 0:
        ratio = trust_coefficient * norm(w) / (norm(g) + norm(w) * WEIGHT_DECAY + 1e-8)
        g = (min(ratio / lr, 1.0) if clip else ratio) * (g + WEIGHT_DECAY * w)
    v = state["momentum_buffer"] = MOMENTUM * state.get("momentum_buffer", 0.0) + g
    return w - lr * v


@on_each_row
def test_lars_follows_barlow_twins(theirs, ours):
    assert_same_after_every_step(lars_step(VECTORS, **ours), rule_step(barlow_twins, VECTORS, **theirs))


@on_each_row
def test_lars_follows_moco_v3(theirs, ours):
    excluded = VECTORS_AND_SCALARS
    assert_same_after_every_step(lars_step(excluded, **ours), rule_step(barlow_twins, excluded, **theirs))


@on_each_row
def test_lars_follows_vissl(theirs, ours):
    group = {"layer_adaptation": False}
    assert_same_after_every_step(lars_step(VECTORS, group, **ours), rule_step(vissl, VECTORS, **theirs))


@on_each_row
def test_lars_follows_simclr_classic(theirs, ours):
    assert_same_after_every_step(lars_step(**ours), rule_step(simclr_classic, **theirs))


@on_each_row
def test_lars_follows_simclr_popular(theirs, ours):
    assert_same_after_every_step(lars_step(**ours), rule_step(simclr_popular, **theirs))


@on_each_row
def test_lars_follows_the_notebook(theirs, ours):
    assert_same_after_every_step(lars_step(**ours), rule_step(notebook, **theirs))


@on_each_row
def test_lars_follows_apex_larc(theirs, ours):
    assert_same_after_every_step(
        lars_step(excluded=(), **ours), rule_step(apex_larc, excluded=(), **theirs), never_zero=ALL
    )


@single_and_foreach
@on_each_row
def test_lamb_reproduces_timm(theirs, ours, foreach):
    timm = peer(TIMM, "timm.optim.lamb")
    group = EXCLUDED | {"layer_adaptation": "always_adapt" in theirs}
    assert_same_after_every_step(
        lamb_step(group=group, **ours),
        torch_step(lambda g: timm.Lamb(g, foreach=foreach, **FOR_LAMB | theirs), start(), weight_decay=0.0),
    )


@on_each_row
def test_lamb_reproduces_torch_optimizer(theirs, ours):
    torch_optimizer = peer(TORCH_OPTIMIZER, "torch_optimizer.lamb")
    assert_same_after_every_step(
        lamb_step(excluded=(), **ours),
        torch_step(lambda g: torch_optimizer.Lamb(g, **FOR_LAMB | theirs), start()),
    )


@on_each_row
def test_lamb_without_adaptation_reproduces_torch_optimizer(theirs, ours):
    torch_optimizer = peer(TORCH_OPTIMIZER, "torch_optimizer.lamb")
    assert_same_after_every_step(
        lamb_step(ALL, {"layer_adaptation": False}, **ours),
        torch_step(lambda g: torch_optimizer.Lamb(g, **FOR_LAMB | theirs), start()),
    )


@on_each_row
def test_lamb_reproduces_torch_optimizer_given_its_learning_rate(theirs, ours):
    torch_optimizer = peer(TORCH_OPTIMIZER, "torch_optimizer.lamb")
    assert_same_after_every_step(
        lamb_step(excluded=(), **ours),
        torch_step(lambda g: torch_optimizer.Lamb(g, **FOR_LAMB | theirs), start()),
        our_lr=lambda t, lr: lr * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t),
    )


@single_and_foreach
@on_each_row
def test_lamb_reproduces_pytorch_optimizer(theirs, ours, foreach):
    pytorch_optimizer = peer(PYTORCH_OPTIMIZER, "pytorch_optimizer.optimizer.lamb")
    assert_same_after_every_step(
        lamb_step(excluded=(), **ours),
        torch_step(lambda g: pytorch_optimizer.Lamb(g, foreach=foreach, **FOR_LAMB | theirs), start()),
    )


@single_and_foreach
@on_each_row
def test_lamb_reproduces_pytorch_optimizer_given_its_learning_rate(theirs, ours, foreach):
    pytorch_optimizer = peer(PYTORCH_OPTIMIZER, "pytorch_optimizer.optimizer.lamb")
    assert_same_after_every_step(
        lamb_step(excluded=(), **ours),
        torch_step(lambda g: pytorch_optimizer.Lamb(g, foreach=foreach, **FOR_LAMB | theirs), start()),
        our_lr=lambda t, lr: lr / (1 - 0.9**t),
    )


def novograd_step(**options: Any) -> Step:
    return torch_step(lambda groups: NovoGrad(groups, **FOR_LAMB | options), start(), ())


def in_float64(step: Step) -> Step:
    """Step a peer whose moments of norms are of the default dtype."""

    def step_in_float64(lr: float, grads: Grads) -> dict[str, tuple[Tensor, dict[str, Any]]]:
        torch.set_default_dtype(torch.float64)
        try:
            return step(lr, grads)
        finally:
            torch.set_default_dtype(torch.float32)

    return step_in_float64


@on_each_row
def test_novograd_reproduces_timm(theirs, ours):
    timm = peer(TIMM, "timm.optim.nvnovograd")
    peers = torch_step(lambda g: timm.NvNovoGrad(g, **FOR_LAMB | theirs), start())
    assert_same_after_every_step(novograd_step(**ours), in_float64(peers))


@on_each_row
def test_novograd_reproduces_torch_optimizer(theirs, ours):
    torch_optimizer = peer(TORCH_OPTIMIZER, "torch_optimizer.novograd")
    peers = torch_step(lambda g: torch_optimizer.NovoGrad(g, **FOR_LAMB | theirs), start())
    assert_same_after_every_step(novograd_step(**ours), in_float64(peers))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_novograd_without_adaptation_is_torch_sgd_bit_for_bit(weight_decay, fused):
    ours, theirs = start(dtype=torch.float32), start(dtype=torch.float32)
    group = {"params": list(ours.values()), "layer_adaptation": False}
    novograd = NovoGrad([group], lr=0.1, betas=(0.9, 0.98), weight_decay=weight_decay, fused=fused)
    sgd = SGD(theirs.values(), lr=0.1, momentum=0.9, weight_decay=weight_decay, fused=fused)
    for grads in gradients(dtype=torch.float32):
        for name, grad in grads.items():
            ours[name].grad, theirs[name].grad = grad, grad.clone()
        novograd.step()
        sgd.step()
        for name, w in ours.items():
            assert torch.equal(w, theirs[name])
    assert novograd.trust_ratios() == {}


def optax_lamb(w, g, state, lr, adapted, *, eps=1e-6):
    """optax/_src/alias.py lamb, Algorithm 2 of the paper with the ratio 1 where a norm is 0; adapts all."""
    t = state["step"] = state.get("step", 0) + 1
    mu = state["exp_avg"] = 0.9 * state.get("exp_avg", 0.0) + 0.1 * g
    nu = state["exp_avg_sq"] = 0.999 * state.get("exp_avg_sq", 0.0) + 0.001 * g**2
    u = mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - 0.999**t)) + eps)
    u = u + WEIGHT_DECAY * w if adapted else u
    return w - lr * ratio_or_one(1.0, w, u) * u


@on_each_row
def test_lamb_follows_optax(theirs, ours):
    ours_step = lamb_step(group={"weight_decay": 0.0}, **ours)
    assert_same_after_every_step(ours_step, rule_step(optax_lamb, **theirs))


@pytest.mark.parametrize(
    ("fused", "dtype"),
    [(False, torch.float32), (False, torch.float64), (True, torch.float32)],
    ids=["float32", "float64", "fused"],
)
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("weight_decay", [0.0, WEIGHT_DECAY])
@pytest.mark.parametrize(
    "momentum",
    [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.1},
        {"momentum": 0.9, "nesterov": True},
    ],
    ids=["no-momentum", "momentum", "dampening", "nesterov"],
)
def test_lars_without_adaptation_is_torch_sgd_bit_for_bit(fused, momentum, weight_decay, maximize, dtype):
    options = {"lr": 1.0, "weight_decay": weight_decay, "maximize": maximize, "fused": fused, **momentum}
    ours = torch_step(lambda g: LARS(g, **options), start(dtype=dtype), ALL, layer_adaptation=False)
    theirs = torch_step(lambda g: SGD(g, **options), start(dtype=dtype), ALL)
    for lr, grads in zip(LEARNING_RATES, gradients(dtype=dtype), strict=True):
        their_layers = theirs(lr, grads)
        for name, (w, state) in ours(lr, grads).items():
            their_w, their_state = their_layers[name]
            assert torch.equal(w, their_w)
            if options["momentum"]:
                assert torch.equal(state["momentum_buffer"], their_state["momentum_buffer"])


@pytest.mark.parametrize("decoupled_weight_decay", [False, True], ids=["in-direction", "decoupled"])
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("weight_decay", [0.0, WEIGHT_DECAY])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)], ids=str)
def test_lamb_without_adaptation_is_torch_adamw(betas, weight_decay, maximize, decoupled_weight_decay):
    options = {"lr": 1.0, "betas": betas, "eps": 1e-6, "weight_decay": weight_decay, "maximize": maximize}
    extra = {"decoupled_weight_decay": decoupled_weight_decay}
    assert_same_after_every_step(
        torch_step(lambda g: LAMB(g, **options, **extra), start(), ALL, layer_adaptation=False),
        torch_step(lambda g: AdamW(g, **options), start(), ALL),
    )


def clipping_scales(norms: np.ndarray, **options: Any) -> np.ndarray:
    """Return what the gradients of each step, and of each layer, are multiplied with."""
    ours = PercentileGradientClipping(**options)
    clipping = PercentileClipping(ours.percentile, ours.history, ours.starts_full)
    return np.stack([clipping.scales(torch.as_tensor(of_step)).numpy() for of_step in norms])


def norms_of_steps(layers: int) -> np.ndarray:
    return np.exp(np.random.default_rng(0).standard_normal((250, layers)))


@on_each_row
def test_clipping_follows_autoclip(theirs, ours):
    norms = norms_of_steps(layers=1)
    wanted = [scale for _, scale in autoclip(norms[:, 0], theirs["percentile"], history=len(norms))]
    assert clipping_scales(norms, **ours)[:, 0] == pytest.approx(wanted, rel=1e-12)
    assert min(wanted) < 0.5


@on_each_row
def test_clipping_follows_bitsandbytes(theirs, ours):
    norms = norms_of_steps(layers=2)
    for layer, scales in enumerate(clipping_scales(norms, **ours).T):
        wanted = [scale for _, scale in percentile_clipping(norms[:, layer], **theirs)]
        assert scales == pytest.approx(wanted, rel=1e-12)
        assert min(wanted) < 0.5


def step_once(ours: Optimizer, theirs: Optimizer, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the one layer of each after a step with that gradient."""
    layers = [optimizer.param_groups[0]["params"][0] for optimizer in (ours, theirs)]
    for layer, optimizer in zip(layers, (ours, theirs), strict=True):
        layer.grad = gradient.clone()
        optimizer.step()
    return layers[0].detach(), layers[1].detach()


@pytest.mark.parametrize(
    ("requirement", "module", "name", "their_ratio"),
    [
        (TIMM, "timm.optim.lars", "Lars", 1.0),
        (OPEN_LARS, "open_lars.lars", "LARS", 1.0),
        (LIGHTLY, "lightly.utils.lars", "LARS", 0.0),
        (TORCH_OPTIMIZER, "torch_optimizer.lars", "LARS", 0.0),
    ],
    ids=["timm", "open_lars", "lightly", "torch_optimizer"],
)
def test_zero_gradient_decays_by_the_adapted_rule_where_peers_decay_in_full_or_not_at_all(
    requirement, module, name, their_ratio
):
    build = getattr(peer(requirement, module), name)
    w = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.05}
    ours, theirs = step_once(
        LARS([Parameter(w.clone())], **options), build([Parameter(w.clone())], **options), torch.zeros_like(w)
    )
    our_ratio = 0.001 * 5.0 / (0.05 * 5.0 + 1e-8)
    assert_close(ours, (1 - 0.5 * our_ratio * 0.05) * w, atol=1e-12, rtol=1e-12)
    assert_close(theirs, (1 - 0.5 * their_ratio * 0.05) * w, atol=1e-12, rtol=1e-12)


def test_zero_gradient_decays_by_the_adapted_rule_where_wrappers_do_not_decay():
    solo = peer(SOLO_LEARN, "solo.utils.lars")
    w = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.05}
    wrapper = solo.LARSWrapper(SGD([Parameter(w.clone())], **options))
    ours, theirs = step_once(LARS([Parameter(w.clone())], **options), wrapper, torch.zeros_like(w))
    our_ratio = 0.001 * 5.0 / (0.05 * 5.0 + 1e-8)
    assert_close(ours, (1 - 0.5 * our_ratio * 0.05) * w, atol=1e-12, rtol=1e-12)
    assert torch.equal(theirs, w)


def test_larc_clips_the_ratio_of_zero_weights_where_wrappers_do_not():
    solo = peer(SOLO_LEARN, "solo.utils.lars")
    wrapper = solo.LARSWrapper(SGD([Parameter(torch.zeros(2, 3))], lr=2.0), clip=True)
    larc = LARS([Parameter(torch.zeros(2, 3))], lr=2.0, trust_clip="larc")
    ours, theirs = step_once(larc, wrapper, torch.ones(2, 3))
    assert torch.equal(ours, torch.full((2, 3), -1.0))
    assert torch.equal(theirs, torch.full((2, 3), -2.0))


def test_first_step_is_not_dampened_where_pytorch_optimizer_dampens_it():
    pytorch_optimizer = peer(PYTORCH_OPTIMIZER, "pytorch_optimizer.optimizer.lars")
    options = {"lr": 0.5, "momentum": 0.9, "dampening": 0.25}
    ours, theirs = step_once(
        LARS([Parameter(torch.zeros(2, 3))], **options),
        pytorch_optimizer.LARS([Parameter(torch.zeros(2, 3))], **options),
        torch.ones(2, 3),
    )
    assert torch.equal(ours, torch.full((2, 3), -0.5))
    assert torch.equal(theirs, torch.full((2, 3), -0.375))


def test_zero_weights_move_where_bitsandbytes_freezes_them():
    options = {"lr": 0.5, "momentum": 0.9}
    lars = LARS([Parameter(torch.zeros(2, 3))], denominator="momentum", trust_clip=1.0, **options)
    theirs = bitsandbytes_lars()([Parameter(torch.zeros(2, 3))], **options)
    ours, theirs = step_once(lars, theirs, torch.ones(2, 3))
    assert torch.equal(ours, torch.full((2, 3), -0.5))
    assert torch.equal(theirs, torch.zeros(2, 3))


def test_norms_of_zero_hold_a_layer_in_place_in_bitsandbytes():
    norms = np.array([[0.0]] * 3 + [[1.0]] * 3)
    assert [scale for _, scale in percentile_clipping(norms[:, 0], 50)][3:] == [0.0] * 3
    scales = clipping_scales(norms, percentile=50 / 0.99, per_layer=True, starts_full=True)
    assert scales[3:].tolist() == [[1.0]] * 3


def test_layer_without_a_gradient_counts_no_step_where_timm_counts_one_for_the_group():
    timm = peer(TIMM, "timm.optim.lamb")
    ours, theirs = start({"matrix", "bias"}), start({"matrix", "bias"})
    optimizers = LAMB(ours.values()), timm.Lamb(theirs.values())
    for layers, optimizer in zip((ours, theirs), optimizers, strict=True):
        layers["matrix"].grad = torch.ones_like(layers["matrix"])
        optimizer.step()
        layers["bias"].grad = torch.ones_like(layers["bias"])
        optimizer.step()
    assert optimizers[0].state[ours["bias"]]["step"] == 1
    assert optimizers[1].param_groups[0]["step"] == 2


def test_every_row_of_the_page_names_a_test_that_runs_it():
    assert ROWS == {}
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [line for line in lines if not line.startswith(("|---", "| Peer |"))]
    assert [row for row in rows if not re.search(r"`test_\w+(\[.+\])?` \|$", row)] == []


@pytest.mark.parametrize("test", sorted(set(re.findall(r"`(test_\w+)", PAGE.read_text()))))
def test_page_names_only_tests_that_exist(test):
    assert callable(globals().get(test))
