"""Kernels in Triton read and write 8-bit state, equal to the bit to what torchao quantizes."""

import pytest
import torch
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.placement_types import Shard
from torch.nn import Parameter

from lightning_lars import LAMB8bit, LARS8bit
from lightning_lars.optim.backends import choice
from lightning_lars.optim.state.eight_bit import EightBitState
from lightning_lars.optim.state.torchao import QuantizationMaps
from tests.support.layers import give_gradients
from tests.support.slow import slow_unless

triton = pytest.importorskip("triton", minversion="3.3", reason="there is no triton for this system")
quantization = pytest.importorskip("torchao.optim.quant_utils", reason="there is no torchao for this system")

kernels = pytest.importorskip("lightning_lars.optim.backends.triton_eight_bit")
table_argument = pytest.importorskip("lightning_lars.optim.backends.triton").table_argument
tl, addresses_of, pointers_to = triton.language, kernels.addresses_of, kernels.pointers_to
rows_from, quantize = kernels.rows_from, kernels.quantize
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of several chunks, cut in the middle of one; of one block; and one whose state stays in 32 bits.
SHAPES = {"long": (36, 256), "short": (16, 16), "odd": (5, 7)}
NAN, INF = float("nan"), float("inf")


@triton.jit
def requantize(x, columns, table, size, rows: tl.constexpr, has_mask: tl.constexpr):
    to = pointers_to(addresses_of(columns, 0, 0, 1), has_mask)
    start = tl.program_id(0) * rows * 256
    at = rows_from(start, rows)
    quantize(to, table, start, size, tl.load(x + at, mask=at < size, other=0.0), has_mask, rows)


def hard_to_round(shares):
    """Blocks of numbers that are held exactly, lie in the middle of two, or right beside it."""
    middles = (shares[1:] + shares[:-1]) / 2
    beside = [torch.nextafter(middles, torch.full_like(middles, sign * INF)) for sign in (1, -1)]
    numbers = torch.cat([shares, middles, *beside])
    rows = numbers[: numbers.numel() // 255 * 255].view(-1, 255)
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1).reshape(-1)


@pytest.mark.parametrize(("rows", "has_mask"), [(1, False), (4, True)])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_scales_are_those_of_torchao_to_the_bit(signed, rows, has_mask):
    torch.manual_seed(0)
    shares = torch.tensor(quantization.create_dynamic_map(signed=signed), device=DEVICE)
    wide = torch.randn(16 * 256, device=DEVICE) * 10 ** torch.empty(16 * 256, device=DEVICE).uniform_(-9, 1)
    bad = torch.tensor([NAN, INF, -INF, 1.0], device=DEVICE).repeat_interleave(256)
    bad[1::2] = 1.0
    x = torch.cat([wide, hard_to_round(shares), torch.zeros(256, device=DEVICE), bad])
    x = x if signed else x.abs()
    scaled, expected_scales = quantization.scale_tensor(x, 256)
    expected = quantization.quantize_8bit_with_qmap(scaled, shares)
    codes, scales = torch.zeros_like(expected), torch.zeros_like(expected_scales)
    columns = torch.tensor([[t.data_ptr()] for t in (codes, scales, shares)], device=DEVICE)
    table = table_argument(QuantizationMaps().code_table(signed, torch.device(DEVICE)))
    grid = (triton.cdiv(x.numel(), 256 * rows),)
    requantize[grid](x, columns, table, x.numel(), rows=rows, has_mask=has_mask)
    torch.testing.assert_close(scales, expected_scales, rtol=0.0, atol=0.0, equal_nan=True)
    assert torch.equal(codes, expected)


def build(optimizer_class, fused, options, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    params = {
        name: Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype))
        for name, shape in SHAPES.items()
    }
    groups = [
        {"params": [params["long"], params["odd"]]},
        {"params": [params["short"]], "layer_adaptation": False},
    ]
    return params, optimizer_class(groups, lr=0.1, min_8bit_size=256, fused=fused, **options)


def take_state(of, params, other, other_params):
    """Put copies of the weights and the state of one optimizer in the place of another's."""
    for p, q in zip(params.values(), other_params.values(), strict=True):
        p.data.copy_(q.data)
        for key, value in other.state[q].items():
            own = of.state[p][key]
            if hasattr(value, "codes"):
                own.codes.copy_(value.codes)
                own.scale.copy_(value.scale)
            else:
                own.copy_(value)


@pytest.fixture
def never_opened(monkeypatch, request):
    """Kernels for the CPU, and an error where they open state of 8 bits."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(choice, "TRITON_DEVICES", {"cpu"})
    unpacked = EightBitState.unpacked

    def refuses(state, states, batch):
        held = [value for of_layer in batch.states if of_layer for value in of_layer.values()]
        assert batch.group["fused"] is False or not any(hasattr(value, "codes") for value in held)
        return unpacked(state, states, batch)

    monkeypatch.setattr(EightBitState, "unpacked", refuses)


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (LARS8bit, {"weight_decay": 0.1, "max_grad_norm": 1.0}),
        slow_unless(False, LARS8bit, {"denominator": "momentum", "nesterov": True, "dampening": 0.3}),
        slow_unless(False, LARS8bit, {"denominator": "decayed_gradient", "lr_in_momentum": True}),
        slow_unless(False, LARS8bit, {"momentum": 0.0}),
        (LAMB8bit, {"weight_decay": 0.1}),
        slow_unless(False, LAMB8bit, {"bias_correction": False, "decoupled_weight_decay": True}),
        slow_unless(False, LAMB8bit, {"grad_averaging": False, "maximize": True, "trust_clip": 0.1}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, slow_unless(False, torch.bfloat16)], ids=str)
def test_a_step_is_that_of_opened_state(optimizer_class, options, dtype, never_opened):
    fused_params, fused = build(optimizer_class, True, options, dtype)
    params, unfused = build(optimizer_class, False, options, dtype)
    for step in range(3):
        for of_each, each in ((fused_params, fused), (params, unfused)):
            give_gradients(of_each.values(), step)
            each.step()
        torch.testing.assert_close(fused.trust_ratios(), unfused.trust_ratios(), rtol=1e-5, atol=0.0)
        rtol = 1e-5 if dtype == torch.float32 else 1e-2
        for p, q in zip(fused_params.values(), params.values(), strict=True):
            torch.testing.assert_close(p, q, rtol=rtol, atol=1e-6)
            assert fused.state[p].keys() == unfused.state[q].keys()
            for key, value in fused.state[p].items():
                expected = unfused.state[q][key]
                assert type(value) is type(expected)
                if hasattr(value, "codes"):
                    torch.testing.assert_close(value.scale, expected.scale, rtol=1e-6, atol=0.0)
                    # What is rounded otherwise in the last bit of float32 may lie on either side of a middle.
                    differ = value.codes != expected.codes
                    assert differ.sum() <= 1e-3 * differ.numel()
                    assert (value.codes.int() - expected.codes.int()).abs().max() <= 1
                else:
                    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        take_state(fused, fused_params, unfused, params)


@pytest.mark.parametrize("optimizer_class", [LARS8bit, slow_unless(False, LAMB8bit)])
def test_a_map_of_a_checkpoint_is_read_once_and_ours_from_then_on(optimizer_class, never_opened):
    params, optimizer = build(optimizer_class, True, {})
    others, other = build(optimizer_class, True, {})
    for step in range(3):
        for of_each, each in ((params, optimizer), (others, other)):
            give_gradients(of_each.values(), step)
            if each is other and step == 1:
                # Codes in another order stand for the same numbers.
                for state in other.state.values():
                    for value in state.values():
                        if hasattr(value, "codes"):
                            value.qmap = value.qmap.flip(0)
                            value.codes.copy_(255 - value.codes)
            each.step()
    for p, q in zip(params.values(), others.values(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("optimizer_class", [LAMB8bit, slow_unless(False, LARS8bit)])
def test_layers_that_are_sharded_take_the_same_step(optimizer_class, mesh, never_opened, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this mesh is of CPUs")
    from lightning_lars.optim import layerwise
    from lightning_lars.sharding.shards import Shard as Sharded

    ends = []
    for is_sharded in (False, True):
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(32, 256, generator=generator)
        g = torch.randn(32, 256, generator=generator)
        p = Parameter(distribute_tensor(w, mesh, [Shard(0)]) if is_sharded else w)
        optimizer = optimizer_class([("p", p)], lr=0.1, weight_decay=0.1, fused=True)
        with monkeypatch.context() as patched:
            if is_sharded:  # among one rank, as among many
                group = mesh.get_group(0)
                found = {p: Sharded((group,), torch.device("cpu"))}
                patched.setattr(layerwise, "find_shards", lambda named, found=found: found)
            for _ in range(2):
                p.grad = distribute_tensor(g, mesh, [Shard(0)]) if is_sharded else g.clone()
                optimizer.step()
        local = p.to_local() if is_sharded else p
        moments = [
            value.to_local() if is_sharded else value for value in optimizer.state[p].values() if value.ndim
        ]
        ends.append((local.detach(), [m.codes for m in moments], [m.scale for m in moments]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer_class", [LARS8bit, slow_unless(False, LAMB8bit)])
def test_a_layer_whose_order_in_memory_is_not_that_of_its_codes_is_opened(optimizer_class, monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(choice, "TRITON_DEVICES", {"cpu"})
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(4, 4, 4, 4, generator=generator).to(DEVICE)
        p = Parameter(w.to(memory_format=memory_format))
        optimizer = optimizer_class([("p", p)], lr=0.1, min_8bit_size=256, fused=True)
        for step in range(2):
            give_gradients([p], step)
            optimizer.step()
        ends.append(p.detach().contiguous())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer_class", [slow_unless(False, LARS8bit), slow_unless(False, LAMB8bit)])
def test_codes_may_lie_at_any_address(optimizer_class, never_opened):
    ends = []
    for offset in (0, 1):
        params, optimizer = build(optimizer_class, True, {})
        for step in range(3):
            give_gradients(params.values(), step)
            for state in optimizer.state.values():
                for value in state.values():
                    if hasattr(value, "codes"):
                        memory = value.codes.new_empty(value.codes.numel() + 1)
                        value.codes = (
                            memory[offset:][: value.codes.numel()].view_as(value.codes).copy_(value.codes)
                        )
            optimizer.step()
        ends.append([p.detach() for p in params.values()])
    torch.testing.assert_close(*ends, rtol=0.0, atol=0.0)
