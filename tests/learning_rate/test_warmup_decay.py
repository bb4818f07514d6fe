"""The curves against their formulas and torch's, and the scheduler that uses them."""

import copy
import io
import math
import pickle
import re
from typing import get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, lr_scheduler

from lightning_lars import LAMB, LARS, WarmupDecayLR
from lightning_lars.learning_rate import curves

W, T, C = 6, 20, 5  # warmup_steps, total_steps and cooldown_steps
STEPS = range(1, T + 1)
START, END = 0.1, 0.01
PEAKS = (0.3, 2.0, 0.0)


def progress(t):
    return (t - 1 - W) / (T - W)


def cooled(t):
    return max(0, (t - 1 - (T - C)) / C)


# The formulas of the design, for t < W and for W < t <= T, and the arguments that bend them.
WARMUPS = {
    "constant": lambda t: START,
    "linear": lambda t: START + (1 - START) * t / W,
    "exponential": lambda t: START ** (1 - t / W),
    "cosine": lambda t: START + (1 - START) * (1 - math.cos(math.pi * t / W)) / 2,
}
DECAYS = {
    "constant": (lambda t: 1.0, {}),
    "cosine": (lambda t: END + (1 - END) * (1 + math.cos(math.pi * progress(t))) / 2, {"end_factor": END}),
    "polynomial": (
        lambda t: END + (1 - END) * (1 - progress(t)) ** 3,
        {"end_factor": END, "power": 3.0},
    ),
    "inverse_sqrt": (lambda t: math.sqrt(W / t), {}),
    "step": (
        lambda t: 1.0 if t <= 10 else 0.5 if t <= 15 else 0.25,
        {"milestones": [10, 15], "gamma": 0.5},
    ),
    "wsd": (
        lambda t: END + (1 - END) * (1 - cooled(t)),
        {"end_factor": END, "cooldown_steps": C},
    ),
}
# The cooldowns beside the linear one.
COOLDOWNS = {
    "sqrt": lambda t: END + (1 - END) * (1 - math.sqrt(cooled(t))),
    "cosine": lambda t: END + (1 - END) * (1 + math.cos(math.pi * cooled(t))) / 2,
}
# Every whole schedule: its arguments, and its factor at each step from 1 to T.
SCHEDULES = {
    f"{warmup}-{decay}": (
        {"warmup": warmup, "decay": decay, "start_factor": START, **options},
        [rise(t) if t < W else 1.0 if t == W else fall(t) for t in STEPS],
    )
    for warmup, rise in WARMUPS.items()
    for decay, (fall, options) in DECAYS.items()
}
SCHEDULES |= {
    f"wsd-{cooldown}": (
        {"decay": "wsd", "cooldown_steps": C, "cooldown": cooldown, "end_factor": END},
        [t / W if t <= W else fall(t) for t in STEPS],
    )
    for cooldown, fall in COOLDOWNS.items()
}
SCHEDULES["one_cycle"] = (
    {"warmup": "cosine", "decay": "one_cycle", "start_factor": START, "end_factor": END},
    [
        START + (1 - START) * (1 - math.cos(math.pi * (t - 1) / (W - 1))) / 2
        if t <= W
        else 1 + (END - 1) * (1 - math.cos(math.pi * (t - W) / (T - W))) / 2
        for t in STEPS
    ],
)
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_optimizer = pytest.mark.parametrize("optimizer_class", [LARS, LAMB, SGD])


def build(optimizer_class=LARS, peaks=PEAKS, **options):
    """An optimizer with a group for each peak, the same at every call."""
    return optimizer_class(
        [{"params": [Parameter(torch.arange(1.0, 4.0) + i)], "lr": lr} for i, lr in enumerate(peaks)],
        **options,
    )


def rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def momenta(optimizer):
    return [group["betas"][0] if "betas" in group else group["momentum"] for group in optimizer.param_groups]


def weights(optimizer):
    return [p.tolist() for group in optimizer.param_groups for p in group["params"]]


def advance(optimizer, scheduler, steps, read=rates):
    """Take optimizer and scheduler steps; return what each optimizer step used."""
    used = []
    for _ in range(steps):
        used.append(read(optimizer))
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = p.detach() * 0.5 + 1
        optimizer.step()
        scheduler.step()
    return used


def close(expected):
    return pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("shape", WARMUPS)
def test_a_warmup_follows_its_formula_and_is_1_from_its_last_step_on(shape):
    curve = getattr(curves, f"{shape}_warmup")
    expected = [WARMUPS[shape](t) if t < W else 1.0 for t in STEPS]
    assert [curve(t, W, START) for t in STEPS] == close(expected)


@pytest.mark.parametrize("shape", WARMUPS)
def test_a_warmup_over_no_step_is_1(shape):
    assert getattr(curves, f"{shape}_warmup")(1, 0, START) == 1.0


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ("cosine", (W, T, END)),
        ("polynomial", (W, T, 3.0, END)),
        ("inverse_sqrt", (W,)),
        ("step", ([10, 15], 0.5)),
        ("constant", ()),
    ],
)
def test_a_decay_is_1_during_the_warmup_and_then_follows_its_formula(shape, arguments):
    curve = getattr(curves, f"{shape}_decay")
    expected = [1.0 if t <= W else DECAYS[shape][0](t) for t in STEPS]
    assert [curve(t, *arguments) for t in STEPS] == close(expected)


@every_schedule
@every_optimizer
def test_every_group_follows_the_schedule_from_its_own_peak(optimizer_class, name):
    arguments, factors = SCHEDULES[name]
    optimizer = build(optimizer_class)
    used = advance(optimizer, WarmupDecayLR(optimizer, W, T, **arguments), T)
    assert used == [close([peak * factor for peak in PEAKS]) for factor in factors]


@every_schedule
@every_optimizer
def test_a_tensor_lr_is_filled_in_place(optimizer_class, name):
    arguments, factors = SCHEDULES[name]
    lrs = [torch.tensor(peak, dtype=torch.float64) for peak in PEAKS]
    optimizer = build(optimizer_class, lrs)
    used = advance(optimizer, WarmupDecayLR(optimizer, W, T, **arguments), T)
    assert used == [close([peak * factor for peak in PEAKS]) for factor in factors]
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, lrs, strict=True))


@every_schedule
def test_the_closed_form_is_the_rate_of_a_step_reached_at_once(name):
    arguments, factors = SCHEDULES[name]
    optimizer = build()
    scheduler = WarmupDecayLR(optimizer, W, T, **arguments)
    scheduler.last_epoch = 11  # after 11 steps, at the twelfth
    assert scheduler._get_closed_form_lr() == close([peak * factors[11] for peak in PEAKS])
    assert scheduler.get_lr() == scheduler._get_closed_form_lr()


@every_optimizer
def test_the_first_and_the_last_step_move_the_weights_with_the_default_arguments(optimizer_class):
    optimizer = build(optimizer_class, peaks=[0.3])
    scheduler = WarmupDecayLR(optimizer, W, T)
    states = [weights(optimizer)]
    for _ in STEPS:
        advance(optimizer, scheduler, 1)
        states.append(weights(optimizer))
    assert states[0] != states[1]
    assert states[-2] != states[-1]


@every_schedule
def test_the_rate_never_climbs_again(name):
    arguments, _ = SCHEDULES[name]
    optimizer = build(peaks=[0.3])
    used = advance(optimizer, WarmupDecayLR(optimizer, W, T, **arguments), 4 * T)
    after_the_warmup = used[W:]
    assert after_the_warmup == sorted(after_the_warmup, reverse=True)


@pytest.mark.parametrize("decay", ["cosine", "polynomial", "one_cycle"])
def test_the_rate_stays_at_the_end_factor_after_the_run(decay):
    optimizer = build(peaks=[0.3])
    scheduler = WarmupDecayLR(optimizer, W, T, "cosine", decay, end_factor=0.25)
    assert advance(optimizer, scheduler, 3 * T)[T:] == [close([0.075])] * (2 * T)


@pytest.mark.parametrize(
    ("shape", "bends"),
    [
        ("constant_warmup", {"start_factor": START}),
        ("linear_warmup", {"start_factor": START}),
        ("exponential_warmup", {"start_factor": START}),
        ("cosine_warmup", {"start_factor": START}),
        ("cosine_decay", {"total_steps": T, "end_factor": END}),
        ("polynomial_decay", {"total_steps": T, "end_factor": END}),
        ("inverse_sqrt_decay", {}),
        ("one_cycle", {"total_steps": T, "start_factor": START, "end_factor": END}),
    ],
)
@settings(max_examples=50, deadline=None)
@given(step=st.integers(1, 3 * T), warmup_steps=st.integers(1, T - 1))
def test_a_curve_climbs_in_the_warmup_alone_and_never_above_the_peak(shape, bends, step, warmup_steps):
    now, then = (getattr(curves, shape)(t, warmup_steps=warmup_steps, **bends) for t in (step, step + 1))
    assert 0 < now <= 1 + 1e-15
    rises = step < warmup_steps and "decay" not in shape
    assert (now <= then + 1e-15) if rises else (then <= now + 1e-15)


def test_the_linear_warmup_is_one_step_ahead_of_linear_lr():
    ours = build()
    theirs = build()
    used = advance(ours, WarmupDecayLR(ours, W, T, decay="constant", start_factor=START), T)
    scheduler = lr_scheduler.LinearLR(theirs, start_factor=START, total_iters=W)
    assert used == [close(each) for each in advance(theirs, scheduler, T + 1)[1:]]


@pytest.mark.parametrize("warmup_steps", [0, 1, W])
@pytest.mark.parametrize(
    ("arguments", "theirs"),
    [
        (
            {"decay": "cosine", "end_factor": 0.1},
            lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=0.03),
        ),
        (
            {"decay": "polynomial", "power": 3.0},
            lambda optimizer, steps: lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=3.0),
        ),
        (
            {"decay": "step", "milestones": [10, 15]},
            lambda optimizer, steps: lr_scheduler.MultiStepLR(optimizer, [10 - T + steps, 15 - T + steps]),
        ),
    ],
    ids=["CosineAnnealingLR", "PolynomialLR", "MultiStepLR"],
)
def test_a_decay_matches_torch_after_the_warmup(arguments, theirs, warmup_steps):
    optimizer, other = build(peaks=[0.3]), build(peaks=[0.3])
    used = advance(optimizer, WarmupDecayLR(optimizer, warmup_steps, T, **arguments), T)
    steps = T - warmup_steps
    assert used[warmup_steps:] == [close(each) for each in advance(other, theirs(other, steps), steps)]


@every_optimizer
@pytest.mark.parametrize("warmup_steps", [0, 2, W, T - 1])
@pytest.mark.parametrize("read", [rates, momenta], ids=["lr", "momentum"])
def test_one_cycle_matches_torch(optimizer_class, warmup_steps, read):
    optimizer, other = build(optimizer_class), build(optimizer_class)
    scheduler = WarmupDecayLR(optimizer, warmup_steps, T, "cosine", "one_cycle")
    theirs = lr_scheduler.OneCycleLR(other, list(PEAKS), total_steps=T, pct_start=warmup_steps / T)
    used = advance(optimizer, scheduler, T, read)
    assert used == [close(each) for each in advance(other, theirs, T, read)]


@pytest.mark.parametrize("read", [rates, momenta], ids=["lr", "momentum"])
def test_one_cycle_takes_its_ends_from_the_arguments(read):
    optimizer, other = build(LAMB), build(LAMB)
    scheduler = WarmupDecayLR(
        optimizer, W, T, "cosine", "one_cycle", start_factor=0.1, end_factor=0.01, momentum_range=(0.5, 0.75)
    )
    theirs = lr_scheduler.OneCycleLR(
        other,
        list(PEAKS),
        total_steps=T,
        pct_start=W / T,
        div_factor=10,
        final_div_factor=10,
        base_momentum=0.5,
        max_momentum=0.75,
    )
    used = advance(optimizer, scheduler, T, read)
    assert used == [close(each) for each in advance(other, theirs, T, read)]


def test_one_cycle_over_a_warmup_of_one_step_starts_at_the_peak():
    optimizer = build(peaks=[0.3])
    scheduler = WarmupDecayLR(optimizer, 1, T, "cosine", "one_cycle")
    used = advance(optimizer, scheduler, T)
    assert used[0] == close([0.3])
    assert used[-1] == close([0.3 / 250_000])


def test_one_cycle_leaves_the_second_beta_alone():
    optimizer = build(LAMB, betas=(0.9, 0.99))
    advance(optimizer, WarmupDecayLR(optimizer, W, T, "cosine", "one_cycle"), T)
    assert [group["betas"][1] for group in optimizer.param_groups] == [0.99] * len(PEAKS)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "one_cycle"])
def test_no_other_schedule_touches_the_momentum(name):
    optimizer = build(momentum=0.7)
    used = advance(optimizer, WarmupDecayLR(optimizer, W, T, **SCHEDULES[name][0]), T, momenta)
    assert used == [[0.7] * len(PEAKS)] * T


def everything(optimizer):
    return rates(optimizer), momenta(optimizer), weights(optimizer)


@pytest.mark.parametrize("steps", range(T + 2))
@pytest.mark.parametrize(
    ("optimizer_class", "name"),
    [
        *((LARS, name) for name in ("linear-cosine", "exponential-step", "wsd-sqrt", "one_cycle")),
        (LAMB, "one_cycle"),
    ],
)
def test_resuming_at_any_step_matches_an_uninterrupted_run(optimizer_class, name, steps):
    arguments, _ = SCHEDULES[name]
    whole = build(optimizer_class)
    scheduler = WarmupDecayLR(whole, W, T, **arguments)
    advance(whole, scheduler, steps)
    file = io.BytesIO()
    torch.save([whole.state_dict(), scheduler.state_dict(), weights(whole)], file)
    file.seek(0)
    saved_optimizer, saved_scheduler, saved_weights = torch.load(file, weights_only=True)

    resumed = build(optimizer_class)
    resumed_scheduler = WarmupDecayLR(resumed, W, T, **arguments)
    resumed.load_state_dict(saved_optimizer)
    resumed_scheduler.load_state_dict(saved_scheduler)
    for group, values in zip(resumed.param_groups, saved_weights, strict=True):
        group["params"][0].data = torch.tensor(values)
    after = advance(resumed, resumed_scheduler, T, everything)
    assert after == advance(whole, scheduler, T, everything)


@pytest.mark.parametrize("steps", [1, W, T])
@every_schedule
def test_a_resume_by_last_epoch_needs_no_state_of_the_scheduler(name, steps):
    arguments, _ = SCHEDULES[name]
    whole = build()
    scheduler = WarmupDecayLR(whole, W, T, **arguments)
    advance(whole, scheduler, steps)
    resumed = build()
    resumed.load_state_dict(whole.state_dict())
    WarmupDecayLR(resumed, W, T, **arguments, last_epoch=steps - 1)
    assert rates(resumed) == rates(whole)
    assert momenta(resumed) == momenta(whole)


@every_schedule
def test_a_pickled_scheduler_continues_with_its_optimizer(name):
    optimizer = build()
    scheduler = WarmupDecayLR(optimizer, W, T, **SCHEDULES[name][0])
    advance(optimizer, scheduler, 3)
    thawed = pickle.loads(pickle.dumps(scheduler))
    after = advance(thawed.optimizer, thawed, T, everything)
    assert after == advance(optimizer, scheduler, T, everything)


@every_schedule
def test_it_runs_as_a_part_of_sequential_lr(name):
    arguments, factors = SCHEDULES[name]
    optimizer = build(peaks=[0.3])
    before = lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100)
    parts = [before, WarmupDecayLR(optimizer, W, T, **arguments)]
    used = advance(optimizer, lr_scheduler.SequentialLR(optimizer, parts, milestones=[3]), T + 3)
    assert used == [close([0.15])] * 3 + [close([0.3 * factor]) for factor in factors]


@pytest.mark.parametrize("as_lr", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("name", ["linear-cosine", "one_cycle"])
def test_a_group_that_is_added_later_follows_from_the_lr_it_was_given(name, as_lr):
    arguments, factors = SCHEDULES[name]
    optimizer = build(peaks=[as_lr(0.5)])
    scheduler = WarmupDecayLR(optimizer, W, T, **arguments)
    advance(optimizer, scheduler, 3)
    optimizer.add_param_group({"params": [Parameter(torch.ones(2))], "lr": as_lr(4.0)})
    scheduler.step()
    used = advance(optimizer, scheduler, T - 4)
    assert used == [pytest.approx([0.5 * factor, 4.0 * factor]) for factor in factors[4:]]
    assert len(scheduler.get_last_lr()) == 2


def test_a_group_that_is_added_later_leaves_earlier_state_dicts_alone():
    optimizer = build(peaks=[0.5])
    scheduler = WarmupDecayLR(optimizer, W, T)
    saved = scheduler.state_dict()
    before = copy.deepcopy(saved)
    optimizer.add_param_group({"params": [Parameter(torch.ones(2))], "lr": 4.0})
    scheduler.optimizer.step()
    scheduler.step()
    assert saved == before


def test_every_argument_has_a_type_that_exists_at_run_time():
    hints = get_type_hints(WarmupDecayLR.__init__)
    code = WarmupDecayLR.__init__.__code__
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    assert set(hints) == {*names, "return"}


NO_EFFECT = [
    ("power", 2.0, {"decay": "cosine"}),
    ("milestones", [10], {"decay": "cosine"}),
    ("gamma", 0.1, {"decay": "polynomial"}),
    ("momentum_range", (0.85, 0.95), {"decay": "cosine"}),
    ("cooldown_steps", 5, {"decay": "cosine"}),
    ("cooldown", "sqrt", {"decay": "polynomial"}),
    ("start_factor", 0.1, {"warmup_steps": 0}),
    ("start_factor", 0.1, {"warmup_steps": 0, "warmup": "cosine", "decay": "one_cycle"}),
    ("end_factor", 0.0, {"decay": "constant"}),
    ("end_factor", 0.0, {"decay": "inverse_sqrt"}),
    ("end_factor", 0.0, {"decay": "step", "milestones": [10]}),
]
REFUSED = [
    ("warmup_steps", -1, "an integer, at least 0", {}),
    ("warmup_steps", 2.0, "an integer, at least 0", {}),
    ("warmup_steps", True, "an integer, at least 0", {}),
    ("total_steps", 0, "an integer, at least 1", {"warmup_steps": 0}),
    ("total_steps", math.inf, "an integer, at least 1", {}),
    ("total_steps", "20", "an integer, at least 1", {}),
    ("warmup_steps", T, "below total_steps=20 .*warm up for fewer steps or train for more", {}),
    ("warmup_steps", T + 1, "below total_steps=20", {}),
    ("warmup_steps", 0, "at least 1 with decay='inverse_sqrt'", {"decay": "inverse_sqrt"}),
    ("warmup", "sine", "one of .*'constant', 'linear', 'exponential', 'cosine'", {}),
    ("warmup", "linear", "'cosine' with decay='one_cycle'", {"decay": "one_cycle"}),
    (
        "decay",
        "exponential",
        "one of .*'constant', 'cosine', 'polynomial', 'inverse_sqrt', 'step', 'wsd', 'one_cycle'",
        {},
    ),
    ("start_factor", -0.1, r"in \[0, 1\]", {}),
    ("start_factor", 1.1, r"in \[0, 1\]", {}),
    ("start_factor", math.nan, r"in \[0, 1\]", {}),
    ("start_factor", "0.1", r"in \[0, 1\]", {}),
    ("start_factor", 0.0, "above 0 with 'exponential'", {"warmup": "exponential"}),
    ("start_factor", 0.0, "above 0 with 'constant'", {"warmup": "constant"}),
    ("start_factor", 0.0, "above 0 with 'one_cycle'", {"warmup": "cosine", "decay": "one_cycle"}),
    ("end_factor", -0.1, r"in \[0, 1\]", {}),
    ("end_factor", 1.1, r"in \[0, 1\]", {}),
    ("power", 0.0, "above 0 and finite", {"decay": "polynomial"}),
    ("power", math.inf, "above 0 and finite", {"decay": "polynomial"}),
    ("gamma", 0.0, r"in \(0, 1\]", {"decay": "step", "milestones": [10]}),
    ("gamma", 1.5, r"in \(0, 1\]", {"decay": "step", "milestones": [10]}),
    ("milestones", (), "ascending optimizer steps above warmup_steps=6", {"decay": "step"}),
    ("milestones", (15, 10), "ascending optimizer steps", {"decay": "step"}),
    ("milestones", (10, 10), "ascending optimizer steps", {"decay": "step"}),
    ("milestones", (10.0, 15.0), "ascending optimizer steps", {"decay": "step"}),
    ("milestones", (W, 10), "above warmup_steps=6", {"decay": "step"}),
    ("milestones", (10, T), "below total_steps=20", {"decay": "step"}),
    ("cooldown_steps", -1, "an integer, at least 0", {"decay": "wsd"}),
    ("cooldown_steps", 2.5, "an integer, at least 0", {"decay": "wsd"}),
    (
        "cooldown_steps",
        T - W + 1,
        "at most 14, what warmup_steps=6 leaves of total_steps=20",
        {"decay": "wsd"},
    ),
    ("cooldown", "exponential", "one of .*'linear', 'sqrt', 'cosine'", {"decay": "wsd"}),
    ("momentum_range", (0.95, 0.85), "0 <= low <= high < 1", {"warmup": "cosine", "decay": "one_cycle"}),
    ("momentum_range", (-0.1, 0.5), "0 <= low <= high < 1", {"warmup": "cosine", "decay": "one_cycle"}),
    ("momentum_range", (0.5, 1.0), "0 <= low <= high < 1", {"warmup": "cosine", "decay": "one_cycle"}),
    ("momentum_range", (0.5,), "0 <= low <= high < 1", {"warmup": "cosine", "decay": "one_cycle"}),
]
REFUSED += [(argument, value, "omitted with .*no effect", others) for argument, value, others in NO_EFFECT]


def refuses(optimizer, match, arguments, error=ValueError):
    """Expect the error, and an optimizer that is as it was."""
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(error, match=match):
        WarmupDecayLR(optimizer, **{"warmup_steps": W, "total_steps": T, **arguments})
    assert optimizer.param_groups == groups
    assert "step" not in vars(optimizer)  # where torch's schedulers leave their mark


@pytest.mark.parametrize(("argument", "value", "rule", "others"), REFUSED)
def test_an_argument_out_of_its_rule_is_refused_and_the_optimizer_unchanged(argument, value, rule, others):
    match = rf"^{argument} must be .*{rule}.*, got {re.escape(repr(value))}$"
    refuses(build(), match, {**others, argument: value})


@pytest.mark.parametrize("warmup", ["constant", "exponential"])
def test_a_warmup_that_cannot_start_at_0_asks_for_a_start_factor(warmup):
    refuses(build(), f"^start_factor must be above 0 with '{warmup}'.*for example 0.1", {"warmup": warmup})


@pytest.mark.parametrize("warmup", ["constant", "exponential"])
def test_without_warmup_no_start_factor_is_required(warmup):
    optimizer = build(peaks=[0.3])
    WarmupDecayLR(optimizer, 0, T, warmup)
    assert rates(optimizer) == [0.3]


def test_a_step_decay_asks_for_its_milestones():
    refuses(build(), "^milestones must be ascending optimizer steps .*got", {"decay": "step"})


def test_one_cycle_refuses_an_optimizer_without_momentum():
    match = "^optimizer must be one with momentum or betas .*got 'Adagrad'"
    refuses(build(Adagrad), match, {"warmup": "cosine", "decay": "one_cycle"})


def test_a_resume_without_initial_lr_is_refused():
    arguments = {"warmup": "cosine", "decay": "one_cycle", "last_epoch": 3}
    refuses(build(), "initial_lr", arguments, error=KeyError)


def test_objects_that_are_no_optimizer_are_refused():
    with pytest.raises(TypeError, match=r"^optimizer must be a torch.optim.Optimizer, got \[\]"):
        WarmupDecayLR([], W, T)


@pytest.mark.parametrize("start_factor", [0.0, -0.1])
def test_the_exponential_curve_refuses_to_start_at_0(start_factor):
    with pytest.raises(ValueError, match=rf"^start_factor must be above 0, got {start_factor}"):
        curves.exponential_warmup(1, W, start_factor)


def test_the_inverse_sqrt_curve_refuses_to_start_without_a_warmup():
    with pytest.raises(ValueError, match=r"^warmup_steps must be at least 1, got 0"):
        curves.inverse_sqrt_decay(1, 0)


def resumed_from(saved, steps, **arguments):
    """A scheduler that goes on from a state, and the rates of the coming steps."""
    optimizer = build()
    scheduler = WarmupDecayLR(optimizer, W, decay="wsd", **arguments)
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    return scheduler, [used[0] / PEAKS[0] for used in advance(optimizer, scheduler, steps)]


@pytest.mark.parametrize("planned", [{"total_steps": 1000}, {"total_steps": 1000, "cooldown_steps": 0}, {}])
@pytest.mark.parametrize("steps", [1, W, 15])
def test_a_stable_run_is_cooled_down_from_a_checkpoint_by_other_arguments(steps, planned):
    optimizer = build()
    scheduler = WarmupDecayLR(optimizer, W, **{"decay": "wsd", "total_steps": None, **planned})
    if not planned:
        scheduler.set_total_steps(10**6)
    advance(optimizer, scheduler, steps)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    cooling, rates_after = resumed_from(
        saved, T - steps, total_steps=T, cooldown_steps=C, cooldown="sqrt", end_factor=END
    )
    assert rates_after == close(SCHEDULES["wsd-sqrt"][1][steps:])
    assert (cooling.total_steps, cooling.cooldown_steps) == (T, C)


@pytest.mark.parametrize("others", [{"total_steps": 40}, {"total_steps": T, "cooldown_steps": 10}])
def test_a_cooldown_that_has_begun_continues_as_planned_with_a_warning(others):
    optimizer = build()
    scheduler = WarmupDecayLR(optimizer, W, T, decay="wsd", cooldown_steps=C)
    advance(optimizer, scheduler, T - 2)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    with pytest.warns(UserWarning, match=f"total_steps={T} and cooldown_steps={C}, which replaces"):
        _, after = resumed_from(saved, 2, **others)
    assert after == close([0.4, 0.2])


def test_a_cooldown_that_would_have_begun_already_is_not_taken_over():
    optimizer = build()
    scheduler = WarmupDecayLR(optimizer, W, 40, decay="wsd", cooldown_steps=C)
    advance(optimizer, scheduler, 18)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    with pytest.warns(UserWarning, match="one of the two cooldowns has begun"):
        cooling, after = resumed_from(saved, 2, total_steps=T, cooldown_steps=C)
    assert after == [1.0, 1.0]
    assert cooling.total_steps == 40


def test_a_scheduler_without_a_length_takes_that_of_the_state_and_keeps_its_own_cooldown():
    optimizer = build()
    scheduler = WarmupDecayLR(optimizer, W, T, decay="wsd", cooldown_steps=2)
    advance(optimizer, scheduler, W)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    cooling, after = resumed_from(saved, T - W, cooldown_steps=C, end_factor=END)
    assert cooling.total_steps == T
    assert after == close(SCHEDULES["linear-wsd"][1][W:])


def test_a_cooldown_that_the_length_of_the_state_cannot_hold_is_refused_and_nothing_has_changed():
    optimizer = build()
    scheduler = WarmupDecayLR(optimizer, W, T, decay="wsd", cooldown_steps=2)
    advance(optimizer, scheduler, 1)
    other = WarmupDecayLR(build(), W, decay="wsd", cooldown_steps=T)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"cooldown_steps must be at most 14, .*got 20"):
        other.load_state_dict(scheduler.state_dict())
    assert other.state_dict() == before


def test_a_cooldown_begins_with_the_next_step_once_its_end_is_set():
    optimizer = build()
    scheduler = WarmupDecayLR(optimizer, W, 10**6, decay="wsd", cooldown_steps=4)
    advance(optimizer, scheduler, 10)
    scheduler.set_total_steps(scheduler.last_epoch + 4)
    used = advance(optimizer, scheduler, 5)
    assert [rate[0] / PEAKS[0] for rate in used] == close([1.0, 0.75, 0.5, 0.25, 0.0])


def test_the_cooldown_is_a_fifth_of_the_run_by_default():
    optimizer = build(peaks=(1.0,))
    used = advance(optimizer, WarmupDecayLR(optimizer, 2, 10, decay="wsd"), 11)
    assert [rate[0] for rate in used] == close([0.5, *[1.0] * 8, 0.5, 0.0])


def test_a_length_into_which_the_cooldown_does_not_fit_is_refused_and_the_old_one_stays():
    scheduler = WarmupDecayLR(build(), W, T, decay="wsd", cooldown_steps=C)
    with pytest.raises(ValueError, match=r"cooldown_steps must be at most 4.*got 5"):
        scheduler.set_total_steps(W + 4)
    assert scheduler.total_steps == T
