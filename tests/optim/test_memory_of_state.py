"""Where weights and state are in memory: on which device, laid out how, and modified when."""

import weakref

import pytest
import torch
from torch.nn import Parameter

from lightning_lars import LAMB, LARS
from lightning_lars.optim.backends import choice
from tests.support.layers import give_gradients, groups, layers, values, walk

both = pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
every_path = pytest.mark.parametrize("path", ["unfused", "torch", "triton"])


@pytest.fixture
def device(path, monkeypatch, request):
    """Where a path is taken: that of Triton on a GPU, or in its interpreter where there is none."""
    if path != "triton":
        return "cpu"
    pytest.importorskip("triton", minversion="3.3", reason="there is no triton for this system")
    if torch.cuda.is_available():
        return "cuda"
    request.getfixturevalue("small_chunks")
    monkeypatch.setattr(choice, "TRITON_DEVICES", {"cpu"})
    return "cpu"


@pytest.fixture
def fused(path):
    """The argument that takes a path."""
    return path != "unfused"


def on(device, params):
    return {name: Parameter(p.detach().to(device)) for name, p in params.items()}


@both
@every_path
def test_a_graph_from_before_a_step_cannot_go_backward_after_it(optimizer_class, fused, device):
    w = Parameter(torch.tensor([1.0, 2.0], device=device))
    optimizer = optimizer_class([w], fused=fused)
    for _ in range(2):
        loss = (w * w).sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@both
@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_counts_as_a_modification_of_weights_and_state_and_of_nothing_else(
    optimizer_class, fused, device, dtype
):
    params = on(device, layers(dtype))
    optimizer = optimizer_class(groups(params), fused=fused)
    walk(optimizer, [0])
    still = params["scale"]
    give_gradients(params.values(), 1)
    still.grad = None
    before = {
        tensor: tensor._version for p in params.values() for tensor in (p, *optimizer.state[p].values())
    }
    grads = [p.grad._version for p in params.values() if p.grad is not None]
    optimizer.step()
    unmoved = {still, *optimizer.state[still].values()}
    assert all((tensor._version > version) == (tensor not in unmoved) for tensor, version in before.items())
    assert [p.grad._version for p in params.values() if p.grad is not None] == grads


@both
@every_path
def test_gradients_are_freed_when_they_are_set_to_none(optimizer_class, fused, device):
    params = on(device, layers())
    optimizer = optimizer_class(groups(params), fused=fused)
    walk(optimizer, [0, 1, 2])
    gradients = [weakref.ref(p.grad) for p in params.values()]
    assert all(gradient() is not None for gradient in gradients)
    optimizer.zero_grad()
    assert all(gradient() is None for gradient in gradients)


@both
@every_path
@pytest.mark.parametrize("max_grad_norm", [pytest.param(None, marks=pytest.mark.slow), 1.0])
def test_a_step_names_the_device_of_all_that_it_makes(optimizer_class, fused, device, max_grad_norm):
    ends = []
    for default in ("cpu", "meta"):
        params = on(device, layers())
        optimizer = optimizer_class(
            groups(params),
            lr=torch.tensor(0.1, device=device),
            fused=fused,
            max_grad_norm=max_grad_norm,
            trust_clip=10.0,
        )
        for step in range(2):
            give_gradients(params.values(), step)
            with torch.device(default):
                optimizer.step()
                ratios = optimizer.trust_ratios()
        held = [tensor for state in optimizer.state.values() for tensor in state.values()]
        assert {tensor.device.type for tensor in held} == {device}
        ends.append({**values(params), **{f"ratio of {name}": ratio for name, ratio in ratios.items()}})
    torch.testing.assert_close(*ends, rtol=0.0, atol=0.0)


@both
@every_path
@pytest.mark.parametrize("key", ["last", "step"])
def test_state_on_another_device_is_refused_before_anything_moves(optimizer_class, fused, device, key):
    params = on(device, layers())
    optimizer = optimizer_class(groups(params), fused=fused)
    walk(optimizer, [0])
    held = optimizer.state[params["linear.weight"]]
    key = list(held)[-1] if key == "last" or key not in held else key
    held[key] = held[key].to("meta")
    before = values(params)
    counts = {name: optimizer.state[p].get("step", torch.ones(())).clone() for name, p in params.items()}
    give_gradients(params.values(), 1)
    with pytest.raises(RuntimeError, match=f"on the same device, but '{key}' .* on meta, and .* on {device}"):
        optimizer.step()
    torch.testing.assert_close(values(params), before, rtol=0.0, atol=0.0)
    for name, p in params.items():
        if name != "linear.weight":
            torch.testing.assert_close(optimizer.state[p].get("step", torch.ones(())), counts[name])


def in_format(memory_format):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, generator=generator)
    return {"conv.weight": Parameter(weight.to(memory_format=memory_format))}


@both
@every_path
@pytest.mark.parametrize("first", [torch.contiguous_format, torch.channels_last], ids=str)
def test_state_follows_a_change_of_memory_format(optimizer_class, fused, device, first):
    other = torch.channels_last if first is torch.contiguous_format else torch.contiguous_format
    params, same = on(device, in_format(first)), on(device, in_format(first))
    optimizer, expected = optimizer_class(groups(params), fused=fused), optimizer_class(groups(same))
    walk(optimizer, [0])
    walk(expected, [0])
    weight = params["conv.weight"]
    weight.data = weight.data.to(memory_format=other)
    walk(optimizer, [1, 2])
    walk(expected, [1, 2])
    torch.testing.assert_close(values(params), values(same), rtol=1e-5, atol=1e-6)
    for key, state in optimizer.state[weight].items():
        assert key == "step" or state.stride() == weight.stride()


@both
@every_path
def test_loaded_state_takes_the_memory_format_of_its_layer(optimizer_class, fused, device):
    params = on(device, in_format(torch.contiguous_format))
    optimizer = optimizer_class(groups(params), fused=fused)
    walk(optimizer, [0])
    saved, weights = optimizer.state_dict(), values(params)
    own = {name: Parameter(w.to(memory_format=torch.channels_last)) for name, w in weights.items()}
    resumed = optimizer_class(groups(own), fused=fused)
    resumed.load_state_dict(saved)
    walk(resumed, [1])
    walk(optimizer, [1])
    torch.testing.assert_close(values(own), values(params), rtol=1e-5, atol=1e-6)
    weight = own["conv.weight"]
    assert all(key == "step" or s.stride() == weight.stride() for key, s in resumed.state[weight].items())


@pytest.mark.parametrize("path", ["triton"])
def test_one_batch_at_a_time_keeps_its_directions(path, device, monkeypatch):
    from lightning_lars.optim import batches
    from lightning_lars.optim.backends.triton import Triton

    monkeypatch.setattr(batches, "_MAX_BATCH_ELEMENTS_IN_KERNEL", 1)
    measure, kept, most = Triton.measure, [], []

    def watched(backend):
        norms = measure(backend)
        kept.append(weakref.ref(backend.stored_direction))
        most.append(sum(direction() is not None for direction in kept))
        return norms

    monkeypatch.setattr(Triton, "measure", watched)
    params = [Parameter(torch.ones(8, device=device)) for _ in range(3)]
    optimizer = LAMB(params, fused=True)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    assert most == [1] * 9
