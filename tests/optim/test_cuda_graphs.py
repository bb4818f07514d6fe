"""On a GPU: CUDA graphs take the steps that eager ones take, and no step waits for the device."""

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from lightning_lars import LAMB, LARS, LAMB8bit, LARS8bit
from tests.support.eight_bit import needs_torchao

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")

CASES = [
    (LARS, {}),
    (LARS, {"denominator": "momentum", "nesterov": True, "max_grad_norm": 1.0}),
    (LARS, {"fused": False}),
    (LAMB, {}),
    (LAMB, {"max_grad_norm": 1.0, "trust_clip": (0.1, 10.0)}),
    (LAMB, {"fused": False}),
    (LARS8bit, {}),
    (LAMB8bit, {}),
    (LAMB8bit, {"fused": False}),
]
cases = pytest.mark.parametrize(("optimizer_class", "options"), CASES, ids=str)


def build(optimizer_class, params, options):
    if "8bit" in optimizer_class.__name__:
        needs_torchao()
        options = {**options, "min_8bit_size": 256}
    return optimizer_class(params, lr=torch.tensor(0.1, device="cuda"), **options)


def layers():
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(64, 256), (64,), (256, 33), ()]
    params = [Parameter(torch.randn(s, generator=generator, device="cuda")) for s in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def warm_up(step):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)


def captured(step):
    """Three steps, and the replay of a captured fourth one."""
    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def equal(params, others):
    for p, other in zip(params, others, strict=True):
        torch.testing.assert_close(p, other, rtol=0.0, atol=0.0)


@cases
def test_no_step_after_the_first_waits_for_the_device(optimizer_class, options):
    params = layers()
    optimizer = build(optimizer_class, params, options)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.trust_ratios()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cases
def test_replays_of_a_graph_are_eager_steps_whatever_comes_between(optimizer_class, options):
    ends = []
    for captures in (True, False):
        params = layers()
        optimizer = build(optimizer_class, params, options)
        step = optimizer.step
        if captures:
            step = captured(optimizer.step)
        else:
            warm_up(optimizer.step)
        grads = [p.grad for p in params]
        for number in range(4):
            for p, grad in zip(params, grads, strict=True):
                grad.fill_(0.1 * (1 + number))
                # New gradients have new addresses, and what is freed is soon something else.
                p.grad = grad.clone() if number == 1 else grad
            (optimizer.step if number == 1 else step)()
            _ = [torch.full((512,), -1, device="cuda") for _ in range(100)]
        ends.append(params)
    equal(*ends)


@cases
def test_an_iteration_can_be_captured_gradients_and_all_and_more_than_once(optimizer_class, options):
    ends = []
    for captures in (True, False):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8)).cuda()
        inputs = torch.ones(4, 64, device="cuda")
        optimizer = build(optimizer_class, list(network.parameters()), options)

        def iteration(network=network, inputs=inputs, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=True)
            network(inputs).square().mean().backward()
            optimizer.step()

        iterations = [iteration, iteration]
        warm_up(iteration)
        if captures:
            iterations = []
            for _ in range(2):
                optimizer.zero_grad(set_to_none=True)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    iteration()
                iterations.append(graph.replay)
        for number in range(4):
            inputs.fill_(0.1 * (1 + number))
            iterations[number % 2]()
        ends.append(list(network.parameters()))
    for p, other in zip(*ends, strict=True):
        torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_two_optimizers_on_two_streams_take_the_steps_they_take_alone(optimizer_class):
    ends = []
    for streams in ([torch.cuda.Stream(), torch.cuda.Stream()], [torch.cuda.current_stream()] * 2):
        both = [layers(), layers()]
        torch.cuda.synchronize()
        for params, stream in zip(both, streams, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)  # what is copied on one stream comes late
                optimizer = build(optimizer_class, params, {})
                for _ in range(2):
                    optimizer.step()
        torch.cuda.synchronize()
        ends.append(both[0] + both[1])
    equal(*ends)


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_state_on_the_host_is_refused(optimizer_class):
    params = layers()
    optimizer = build(optimizer_class, params, {})
    optimizer.step()
    key = list(optimizer.state[params[0]])[-1]
    optimizer.state[params[0]][key] = optimizer.state[params[0]][key].cpu()
    with pytest.raises(RuntimeError, match=f"on the same device, but '{key}' .* is on cpu"):
        optimizer.step()
