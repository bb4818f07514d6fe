"""Which calls count as optimizer steps."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from lightning_lars import LAMB, LARS
from lightning_lars.learning_rate.optimizer_steps import OptimizerSteps
from tests.support.wrappers import SAM, Bare, HookedLookahead, Lookahead, OwnStep

OPTIMIZERS = [torch.optim.SGD, torch.optim.AdamW, LARS, LAMB]


def weights(count=2):
    return [nn.Parameter(torch.ones(3)) for _ in range(count)]


def backward(optimizer, scale=1.0):
    loss = sum((p * scale).sum() for group in optimizer.param_groups for p in group["params"])
    loss.backward()
    return loss


@pytest.fixture(params=OPTIMIZERS, ids=lambda each: each.__name__)
def optimizer(request):
    return request.param(weights(), lr=0.1)


def test_a_step_with_a_gradient_counts(optimizer):
    steps = OptimizerSteps(optimizer)
    for taken in range(1, 4):
        backward(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        assert steps.taken == taken


def test_a_step_without_a_gradient_does_not_count(optimizer):
    steps = OptimizerSteps(optimizer)
    optimizer.step()
    assert steps.taken == 0


def test_a_gradient_of_zero_is_a_gradient(optimizer):
    steps = OptimizerSteps(optimizer)
    backward(optimizer, 0.0)
    optimizer.step()
    assert steps.taken == 1


def test_one_gradient_is_enough(optimizer):
    steps = OptimizerSteps(optimizer)
    optimizer.param_groups[0]["params"][1].grad = torch.ones(3)
    optimizer.step()
    assert steps.taken == 1


@pytest.mark.parametrize("evaluations", [1, 4])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_counts_once_however_often_it_is_evaluated(evaluations, by_keyword):
    optimizer = torch.optim.LBFGS(weights(), lr=0.1, max_iter=evaluations)
    steps = OptimizerSteps(optimizer)
    seen = []

    def closure():
        seen.append((steps.is_stepping, steps.number))
        optimizer.zero_grad()
        loss = sum((p - 2).pow(4).sum() for p in optimizer.param_groups[0]["params"])
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
    assert steps.taken == 2
    assert len(seen) >= 2 * evaluations
    assert {number for _, number in seen} == {1, 2}
    assert not any(stepping for stepping, _ in seen)


def test_a_closure_that_leaves_no_gradient_does_not_count(optimizer):
    """Lightning's, where training_step returned None: the gradients are those of the batch before."""
    steps = OptimizerSteps(optimizer)
    backward(optimizer)
    optimizer.step(optimizer.zero_grad)
    assert steps.taken == 0


def test_a_closure_that_leaves_what_others_accumulated_counts(optimizer):
    steps = OptimizerSteps(optimizer)
    backward(optimizer)
    optimizer.step(lambda: None)
    assert steps.taken == 1


@pytest.mark.parametrize("registered", ["before", "after"])
def test_a_hook_that_zeroes_gradients_inside_the_step_hides_none(optimizer, registered):
    if registered == "before":
        optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
    steps = OptimizerSteps(optimizer)
    if registered == "after":
        optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
    for _ in range(3):
        backward(optimizer)
        optimizer.step()
    assert steps.taken == 3


def test_a_hook_that_makes_the_gradients_counts(optimizer):
    steps = OptimizerSteps(optimizer)
    optimizer.register_step_pre_hook(lambda *_: backward(optimizer) and None)
    optimizer.step()
    assert steps.taken == 1


@pytest.mark.parametrize("base", OPTIMIZERS)
@pytest.mark.parametrize("zero_grad", [False, True])
def test_two_halves_of_sam_are_one_step(base, zero_grad):
    optimizer = SAM(weights(), base, lr=0.1)
    steps = OptimizerSteps(optimizer)
    for taken in range(1, 4):
        backward(optimizer)
        optimizer.first_step(zero_grad=zero_grad)
        assert steps.taken == taken - 1
        backward(optimizer)
        optimizer.second_step(zero_grad=zero_grad)
        assert steps.taken == taken


@pytest.mark.parametrize("base", OPTIMIZERS)
def test_a_closure_of_sam_is_one_step(base):
    optimizer = SAM(weights(), base, lr=0.1)
    steps = OptimizerSteps(optimizer)
    numbers = []
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: numbers.append(steps.number))
    for _ in range(3):
        backward(optimizer)
        optimizer.step(lambda: backward(optimizer))
    assert steps.taken == 3
    assert numbers == [1, 2, 3]


@pytest.mark.parametrize("kind", [Lookahead, HookedLookahead])
@pytest.mark.parametrize("base", OPTIMIZERS)
def test_an_optimizer_inside_another_takes_one_step_with_it(base, kind):
    optimizer = kind(base(weights(), lr=0.1))
    steps = OptimizerSteps(optimizer)
    for _ in range(3):
        backward(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    assert steps.taken == 3


def test_optimizers_that_share_the_layers_of_one_take_one_step_with_it():
    class Both(torch.optim.Optimizer):
        """As Muon for matrices and AdamW for the rest."""

        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})
            (group,) = self.param_groups
            half = len(group["params"]) // 2
            self.parts = {"sgd": torch.optim.SGD(group["params"][:half], lr=0.1)}
            self.rest = [torch.optim.AdamW(group["params"][half:], lr=0.1)]

        def step(self, closure=None):
            for part in (*self.parts.values(), *self.rest):
                part.step()

    optimizer = Both(weights(4))
    steps = OptimizerSteps(optimizer)
    for _ in range(3):
        backward(optimizer)
        optimizer.step()
    assert steps.taken == 3
    for part in (*optimizer.parts.values(), *optimizer.rest):  # and without it
        part.step()
    assert steps.taken == 4


def test_an_attached_optimizer_of_other_layers_is_independent():
    optimizer, other = (torch.optim.SGD(weights(), lr=0.1) for _ in range(2))
    optimizer.friend = other
    steps = OptimizerSteps(optimizer)
    backward(other)
    other.step()
    assert steps.taken == 0


@pytest.mark.parametrize("base", OPTIMIZERS)
def test_a_step_that_calls_super_step_is_one_step(base):
    class Own(base):
        def step(self, closure=None):
            return super().step(closure)

    base(weights(), lr=0.1)  # has torch wrap the step of the base class, too
    optimizer = Own(weights(), lr=0.1)
    steps = OptimizerSteps(optimizer)
    for _ in range(3):
        backward(optimizer)
        optimizer.step()
    assert steps.taken == 3


def overflow(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad.fill_(torch.inf)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips_do_not_count(fused):
    optimizer = torch.optim.SGD(weights(), lr=0.1, fused=fused)
    steps = OptimizerSteps(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for batch in range(6):
        optimizer.zero_grad()
        scaler.scale(backward(optimizer))
        if batch in (0, 1, 4):
            overflow(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert steps.taken == 3


@pytest.mark.parametrize("taken", [0, 2])
def test_the_trial_steps_of_distributed_checkpoint_do_not_count(optimizer, taken):
    """Which fill what state is missing, as one is saved or loaded."""
    module = nn.Module()
    module.params = nn.ParameterList(optimizer.param_groups[0]["params"])
    steps = OptimizerSteps(optimizer)
    for _ in range(taken):
        backward(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    before = [p.detach().clone() for p in module.parameters()]
    get_optimizer_state_dict(module, optimizer)
    get_optimizer_state_dict(module, optimizer)
    assert steps.taken == taken
    assert all(torch.equal(was, p) for was, p in zip(before, module.parameters(), strict=True))


def test_a_step_at_a_rate_of_zero_counts(optimizer):
    """A schedule that starts at 0: Adam's moments move."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    steps = OptimizerSteps(optimizer)
    backward(optimizer)
    optimizer.step(closure=None)
    assert steps.taken == 1


def by_group(optimizer):
    """As DeepSpeed ZeRO stages 1 and 2 call the optimizer that they wrap."""
    groups = optimizer.param_groups
    for group in groups:
        optimizer.param_groups = [group]
        optimizer.step()
    optimizer.param_groups = groups


def by_part(optimizer):
    """As DeepSpeed ZeRO stage 3 does: between steps, its groups are empty."""
    (group,) = optimizer.param_groups
    params = group["params"]
    for p in params:
        group["params"] = [p]
        optimizer.step()
    group["params"] = params


@pytest.mark.parametrize("step", [by_group, by_part])
@pytest.mark.parametrize("without_gradient", [(), (0,), (1,), (2,), (0, 1)])
def test_calls_for_one_group_after_the_other_are_one_step(step, without_gradient):
    params = weights(3)
    groups = [{"params": [p]} for p in params] if step is by_group else params
    optimizer = torch.optim.SGD(groups, lr=0.1)
    steps = OptimizerSteps(optimizer)
    numbers = []
    optimizer.register_step_pre_hook(lambda *_: numbers.append(steps.number))
    for _ in range(3):
        backward(optimizer)
        for index in without_gradient:
            params[index].grad = None
        step(optimizer)
        optimizer.zero_grad()
    assert steps.taken == 3
    assert numbers == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_layers_that_take_turns_are_steps_of_their_own(optimizer):
    params = optimizer.param_groups[0]["params"]
    steps = OptimizerSteps(optimizer)
    for step in range(4):
        optimizer.zero_grad()
        params[step % 2].grad = torch.ones(3)
        optimizer.step()
    assert steps.taken == 4


def test_layers_that_join_take_part_in_the_coming_step(optimizer):
    steps = OptimizerSteps(optimizer)
    for taken in range(1, 4):
        backward(optimizer)
        optimizer.step()
        assert steps.taken == taken
        optimizer.add_param_group({"params": weights()})


@pytest.mark.parametrize("fails", ["update", "closure"])
def test_a_step_that_failed_does_not_count_and_the_next_one_does(optimizer, fails):
    steps = OptimizerSteps(optimizer)

    def fail(*_):
        raise RuntimeError("broken off")

    backward(optimizer)
    if fails == "closure":
        with pytest.raises(RuntimeError, match="broken off"):
            optimizer.step(fail)
    else:
        handle = optimizer.register_step_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken off"):
            optimizer.step()
        handle.remove()
    assert steps.taken == 0
    optimizer.step()
    assert steps.taken == 1


def test_ignored_steps_are_not_adjusted(optimizer):
    counts, calls = [False], []
    steps = OptimizerSteps(
        optimizer, lambda: calls.append("before"), lambda: calls.append("after"), lambda: counts[0]
    )
    backward(optimizer)
    optimizer.step()
    assert (steps.taken, calls) == (0, [])
    counts[0] = True
    optimizer.step(lambda: None)
    assert (steps.taken, calls) == (1, ["before", "after", "before", "after"])


def test_a_detached_optimizer_steps_with_plain_values(optimizer):
    steps = OptimizerSteps(optimizer)
    steps.detach()
    backward(optimizer)
    optimizer.step()
    assert steps.taken == 0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("kind", [Bare, OwnStep])
def test_an_optimizer_whose_steps_cannot_be_observed_raises(kind):
    with pytest.raises(TypeError, match=rf"call step hooks, .* got a {kind.__name__}, whose steps cannot be"):
        OptimizerSteps(kind(weights()))
