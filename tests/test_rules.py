"""Arguments that LARS and LAMB refuse, by name, rule and value, and what stays as it was."""

import re
from math import inf, nan
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from lightning_lars import (
    LAMB,
    LARS,
    BatchSizeScaling,
    BatchSizeSchedule,
    GradientNoiseScale,
    LearningRateWarmup,
    ParamGroupSummary,
    PercentileGradientClipping,
    PreciseBatchNorm,
    WarmupDecayLR,
    recipes,
)
from lightning_lars.rules import FLAG
from lightning_lars.trainer.batch_size import _batch_size_of
from tests.support.layers import layers, walk

both = pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
NOT_A_SIZE = [-0.1, nan, inf, -inf]
NOT_POSITIVE = [0.0, -1.0, nan, -inf]
NOT_A_SHARE = [-0.1, 1.0, nan, inf]
BOTH_REFUSE = {
    "lr": [*NOT_A_SIZE, torch.tensor(-0.1), torch.tensor(nan)],
    "weight_decay": NOT_A_SIZE,
    "eps": NOT_A_SIZE,
    "max_grad_norm": NOT_POSITIVE,
    "fused": [1, 0, "cuda"],
}
LARS_REFUSES = {
    "momentum": NOT_A_SHARE,
    "dampening": NOT_A_SHARE,
    "trust_coefficient": [*NOT_POSITIVE, inf],
    "denominator": ["weights", None, "Gradient"],
    "trust_clip": [True, False, 0, -1.0, nan, "lars", (1.0, 2.0), (2.0, 1.0)],
}
LAMB_REFUSES = {
    "betas": [(b, 0.999) for b in NOT_A_SHARE] + [(0.9, b) for b in NOT_A_SHARE] + [(0.9,), (0.9, 0.9, 0.9)],
    "max_weight_norm": NOT_POSITIVE,
    "trust_eps": NOT_A_SIZE,
    "trust_clip": [
        True, 0, -1.0, nan, "larc", "lars", (2, 1), (0, 0), (-1.0, 1.0), (nan, 1.0), (0.0, nan), (1.0,),
        (0.1, 0.2, 0.3),
    ],
}  # fmt: skip
REFUSED = [
    (optimizer_class, argument, value)
    for optimizer_class, own in ((LARS, LARS_REFUSES), (LAMB, LAMB_REFUSES))
    for argument, refused in {**BOTH_REFUSE, **own}.items()
    for value in refused
]
WRONG_TYPES = [
    (optimizer_class, argument, value)
    for optimizer_class, arguments in (
        (LARS, ["lr", "momentum", "weight_decay", "dampening", "trust_coefficient", "eps"]),
        (LAMB, ["lr", "betas", "eps", "weight_decay", "trust_eps"]),
    )
    for argument in arguments
    for value in ("0.5", None)
]
WRONG_TYPES += [(optimizer_class, "max_grad_norm", "0.5") for optimizer_class in (LARS, LAMB)]
WRONG_TYPES += [(LAMB, "max_weight_norm", "0.5"), (LAMB, "betas", 0.9), (LAMB, "betas", ("0.9", "0.999"))]
WRONG_TYPES += [(LAMB, "trust_clip", ("0.1", "1.0")), (LAMB, "trust_clip", (None, 1.0))]


def says(argument, value):
    return rf"^{argument} must be .*got {re.escape(repr(value))}"


@pytest.mark.parametrize(("optimizer_class", "argument", "value"), REFUSED)
def test_an_argument_out_of_range_is_refused(optimizer_class, argument, value):
    with pytest.raises(ValueError, match=says(argument, value)):
        optimizer_class([Parameter(torch.ones(2))], **{argument: value})


@pytest.mark.parametrize(("optimizer_class", "argument", "value"), REFUSED)
def test_a_group_option_out_of_range_is_refused(optimizer_class, argument, value):
    with pytest.raises(ValueError, match=says(argument, value)):
        optimizer_class([{"params": [Parameter(torch.ones(2))], argument: value}])


@pytest.mark.parametrize(("optimizer_class", "argument", "value"), WRONG_TYPES)
def test_an_argument_of_the_wrong_type_is_refused(optimizer_class, argument, value):
    with pytest.raises((TypeError, ValueError), match=says(argument, value)):
        optimizer_class([Parameter(torch.ones(2))], **{argument: value})


@both
def test_an_lr_of_two_elements_is_refused(optimizer_class):
    with pytest.raises(ValueError, match=r"lr must be a number or a tensor of one element, got shape \(2,\)"):
        optimizer_class([Parameter(torch.ones(2))], lr=torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize(
    ("argument", "value"), [("nesterov", True), ("lr_in_momentum", True), ("dampening", 0.1)]
)
@pytest.mark.parametrize("denominator", ["gradient", "momentum"])
def test_one_cycle_is_refused_without_momentum(argument, value, denominator):
    with pytest.raises(ValueError, match=rf"^{argument} must be .*unless momentum is above 0.*got {value}"):
        LARS([Parameter(torch.ones(2))], momentum=0.0, denominator=denominator, **{argument: value})


def test_lr_in_momentum_is_refused_where_momentum_is_the_denominator():
    with pytest.raises(
        ValueError, match=r'^lr_in_momentum must be False with denominator="momentum".*got True'
    ):
        LARS([Parameter(torch.ones(2))], lr_in_momentum=True, denominator="momentum")


@both
@pytest.mark.parametrize("second", [2.0, None])
def test_max_grad_norm_must_be_the_same_in_every_group(optimizer_class, second):
    own = [{"params": [Parameter(torch.ones(2))], "max_grad_norm": norm} for norm in (1.0, second)]
    with pytest.raises(ValueError, match=rf"^max_grad_norm must be the same in every group.*got {second}"):
        optimizer_class(own)


def w():
    return Parameter(torch.ones(2))


SHARED = w()
BAD_PARAMS = {
    "nothing": ([], "params must hold at least one parameter, got none"),
    "one twice in a group": ([SHARED, SHARED], "every parameter once, got parameter 1 twice"),
    "one twice by name": ([("a", SHARED), ("b", SHARED)], "every parameter once, got parameter 'b' twice"),
    "one in two groups": ([{"params": [SHARED]}, {"params": [SHARED]}], "every parameter once, .* twice"),
    "one in two groups, bare": (
        [{"params": SHARED}, {"params": SHARED}],
        "once|more than one parameter group",
    ),
    "a name twice in a group": ([("a", w()), ("a", w())], "unique names, got 'a' twice"),
    "a name in two groups": (
        [{"params": [("a", w())]}, {"params": [("a", w())]}],
        "unique names, got 'a' twice",
    ),
    "only one with a name": ([("a", w()), w()], "names"),
    "a result": ([("a", w() * 2)], "leaf tensors, got parameter 'a'"),
    "a bare result": ([{"params": w() * 2}], "leaf"),
    "complex": ([torch.zeros(2, dtype=torch.complex64)], "real floating-point tensors, .*complex64"),
    "bare complex": ([{"params": torch.zeros(2, dtype=torch.complex64)}], "real floating-point .*complex64"),
    "integer": ([("a", torch.zeros(2, dtype=torch.int64))], "real floating-point tensors, .*'a' of .*int64"),
    "bare integer": ([{"params": torch.zeros(2, dtype=torch.int64)}], "real floating-point .*int64"),
}


@both
@pytest.mark.parametrize("kind", BAD_PARAMS)
def test_bad_params_are_refused(optimizer_class, kind):
    params, match = BAD_PARAMS[kind]
    with pytest.raises(ValueError, match=match):
        optimizer_class(params)


@both
@pytest.mark.parametrize(
    ("params", "match"),
    [(torch.ones(2), "iterable"), ([1.0], r"got 1.0 at 0"), ([("a", None)], "got None at 0")],
    ids=["a tensor", "a number", "a name for None"],
)
def test_objects_that_are_not_parameters_are_refused(optimizer_class, params, match):
    with pytest.raises(TypeError, match=match):
        optimizer_class(params)


BAD_GROUPS = {
    "option": lambda own: {"params": [("new", w())], "weight_decay": -1.0},
    "other max_grad_norm": lambda own: {"params": [("new", w())], "max_grad_norm": 3.0},
    "taken parameter": lambda own: {"params": [("new", own["scale"])]},
    "taken name": lambda own: {"params": [("scale", w())]},
    "some names": lambda own: {"params": [("new", w()), w()]},
    "complex": lambda own: {"params": [("new", w()), ("other", torch.zeros(2, dtype=torch.complex64))]},
    "a number": lambda own: {"params": [("new", w()), ("other", 1.0)]},
    "a set": lambda own: {"params": {w()}},
}


@both
@pytest.mark.parametrize("kind", BAD_GROUPS)
def test_a_group_that_is_refused_changes_nothing(optimizer_class, kind):
    params = layers()
    optimizer = optimizer_class(params.items())
    walk(optimizer, range(1))
    group = BAD_GROUPS[kind](params)
    before = dict(group)
    groups, state, ratios = optimizer.param_groups[:], dict(optimizer.state), optimizer.trust_ratios()
    own = {key: list(x) if isinstance(x, list) else x for key, x in groups[0].items()}
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0] is groups[0]
    assert groups[0] == own
    assert dict(optimizer.state) == state
    assert optimizer.trust_ratios() == ratios
    assert group == before


@both
@pytest.mark.parametrize("lr", [0, 0.0, torch.tensor(0.0), 1, torch.tensor([0.5])], ids=repr)
def test_a_legal_lr_is_kept_as_it_was_given(optimizer_class, lr):
    assert optimizer_class([w()], lr=lr).param_groups[0]["lr"] is lr


@both
@pytest.mark.parametrize("fused", [None, False])
def test_fused_may_be_absent_or_off(optimizer_class, fused):
    assert optimizer_class([w()], fused=fused).param_groups[0]["fused"] is fused


@both
def test_a_group_without_names_gets_numbers_where_the_others_have_names(optimizer_class):
    """As Lightning's BaseFinetuning adds what it unfreezes."""
    params, late = layers(), w()
    optimizer = optimizer_class(params.items())
    optimizer.add_param_group({"params": [late]})
    assert optimizer.param_groups[1]["param_names"] == [str(len(params))]
    late.grad = torch.ones_like(late)
    optimizer.step()
    assert list(optimizer.trust_ratios()) == [str(len(params))]


@both
@pytest.mark.parametrize("value", ["no", "False", None, 1])
def test_a_switch_that_is_neither_true_nor_false_is_refused(optimizer_class, value):
    switches = [name for name, rule in optimizer_class.RULES.items() if rule is FLAG]
    assert len(switches) >= 5
    for switch in switches:
        with pytest.raises(ValueError, match=f"{switch} must be True or False, got {value!r}"):
            optimizer_class([{"params": [w()], switch: value}])


@both
@pytest.mark.parametrize(
    "params", [torch.nn.Linear(2, 2), None, 3, {"params": []}, [{"lr": 0.1}]], ids=lambda p: type(p).__name__
)
def test_objects_without_parameters_are_refused_with_a_remedy(optimizer_class, params):
    with pytest.raises(TypeError, match=r"pass model\.parameters\(\)|must be a dict with \"params\""):
        optimizer_class(params)


@both
def test_groups_do_not_share_a_tensor_lr(optimizer_class):
    """A scheduler multiplies the rate of every group: a shared one twice."""
    optimizer = optimizer_class([{"params": [w()]}, {"params": [w()]}], lr=torch.tensor(1.0))
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25, 0.25]


INTEGERS = [np.int64(4), np.uint8(4), torch.tensor(4), np.array(4)]
NO_INTEGERS = [True, np.True_, torch.tensor(True), 4.0, np.float64(4), torch.tensor(4.0), "4", [4], None]


@pytest.mark.parametrize("four", INTEGERS, ids=lambda four: type(four).__name__)
def test_an_integer_of_any_type_is_one_wherever_a_count_is_asked_for(four):
    counts = [
        BatchSizeScaling(base_batch_size=four).base_batch_size,
        BatchSizeScaling(batch_size=four).batch_size,
        BatchSizeSchedule({0: four, 4: 8}).batch_sizes,
        BatchSizeSchedule(start=four, end=16, factor=four, every=four).batch_sizes,
        BatchSizeSchedule(start=four, end=8, increment=four, every=four).batch_sizes,
        GradientNoiseScale(every_n_steps=four).every_n_steps,
        LearningRateWarmup(warmup_steps=four).warmup_steps,
        ParamGroupSummary(max_rows=four).max_rows,
        PercentileGradientClipping(history=four).history,
        PreciseBatchNorm(num_batches=four).num_batches,
    ]
    sizes, grown, ramp = {0: 4, 4: 8}, {0: 4, 4: 16}, {0: 4, 4: 8}
    assert repr(counts) == repr([4, 4, sizes, grown, ramp, 4, 4, 4, 4, 4])  # ints, so that JSON takes them
    assert repr(recipes.lars(four)) == repr(recipes.lars(4))
    optimizer = LARS([Parameter(torch.ones(2))])
    scheduler = WarmupDecayLR(optimizer, four, four * 3, "linear", "step", milestones=[four * 2])
    length = scheduler.warmup_steps, scheduler.total_steps, scheduler.milestones
    assert repr(length) == "(4, 12, (8,))"
    # As a sampler of batches, or a loader that is not torch's, may have it.
    assert repr(_batch_size_of(SimpleNamespace(batch_size=four))) == "4"


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_what_is_no_integer_is_refused_as_that(value):
    with pytest.raises(
        ValueError, match="num_batches must be an integer above 0, got " + re.escape(repr(value))
    ):
        PreciseBatchNorm(num_batches=value)
    with pytest.raises(ValueError, match="warmup_steps must be an integer, at least 0"):
        WarmupDecayLR(LARS([Parameter(torch.ones(2))]), warmup_steps=value)
