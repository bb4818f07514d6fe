"""Memory that is worked in, of many optimizers and of many threads."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lightning_lars import LAMB
from lightning_lars.optim.backends.scratch import Scratch

SIZE, DEPTH = 64, 20


def bytes_alive():
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]
    # Other tests of this process may have left sparse ones.
    stored = [each.untyped_storage() for each in tensors if torch._C._has_storage(each)]
    return sum({each.data_ptr(): each.nbytes() for each in stored}.values())


def steps_in_backward(model):
    """Give every parameter an optimizer of its own, which steps as soon as its gradient is there."""
    optimizers = {p: LAMB([p], lr=0.01) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    return optimizers


def test_one_optimizer_per_layer_needs_the_scratch_of_one_layer():
    model = nn.Sequential(*[nn.Linear(SIZE, SIZE, bias=False) for _ in range(DEPTH)])
    before = bytes_alive()
    optimizers = steps_in_backward(model)
    for _ in range(2):
        model(torch.ones(1, SIZE)).sum().backward()
    state = 2 * DEPTH * SIZE**2 * 4
    scratch = bytes_alive() - before - state
    assert len(optimizers) == DEPTH
    assert scratch < 3 * SIZE**2 * 4  # a model of it would be 20


def test_memory_in_use_is_not_shared():
    layer = torch.zeros(100)
    first, second = Scratch(), Scratch()
    (of_first,), (of_second,) = first.like([layer]), second.like([layer])
    of_first.fill_(1)
    of_second.fill_(2)
    assert of_first.eq(1).all()
    kept = of_first.data_ptr()
    first.release()  # still in use, by the caller
    first.recycle()
    assert Scratch().like([layer])[0].data_ptr() != kept
    second.recycle()
    assert Scratch().like([layer])[0].data_ptr() == of_second.data_ptr()


@pytest.mark.parametrize("other", [torch.zeros(100, dtype=torch.float64), torch.zeros(100, device="meta")])
def test_memory_is_of_one_dtype_and_device(other):
    scratch, layer = Scratch(), torch.zeros(100)
    pointer = scratch.like([layer])[0].data_ptr()
    (of_other,) = scratch.like([other])
    assert (of_other.dtype, of_other.device) == (other.dtype, other.device)
    scratch.recycle()
    assert scratch.like([layer])[0].data_ptr() == pointer


def test_memory_of_inference_mode_is_not_cached_for_steps_outside_it():
    with torch.inference_mode():
        scratch = Scratch()
        scratch.like([torch.zeros(10)])
        scratch.recycle()
    Scratch().like([torch.zeros(10)])[0].fill_(1)


def train(seed, steps=30, meet=None):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(seed)
    weights = [nn.Parameter(torch.rand(50, 50, generator=generator)) for _ in range(4)]
    optimizers = [LAMB([w], lr=0.1) for w in weights]
    if meet is not None:
        meet.wait()
    for _ in range(steps):
        for w, optimizer in zip(weights, optimizers, strict=True):
            w.grad = torch.rand(50, 50, generator=generator)
            optimizer.step()
    return [w.detach() for w in weights]


def test_concurrent_threads_do_not_share_memory():
    meet = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: train(seed, meet=meet), range(4)))
    for seed, weights in enumerate(together):
        for left, right in zip(train(seed), weights, strict=True):
            assert torch.equal(left, right)
