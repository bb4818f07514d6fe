"""Checkpoints of other packages load, and training continues as there: rows of docs/checkpoints.md."""

import copy
import io

import pytest
import torch
from torch.nn import Parameter

from lightning_lars import LAMB, LARS, LAMB8bit, LARS8bit
from tests.support.eight_bit import needs_torchao
from tests.support.peers import PEERS, peer
from tests.support.ranks import RankError, on_ranks
from tests.workers import bitsandbytes_states

pytestmark = pytest.mark.timeout(180)  # packages are installed

LIGHTLY = ("lightly==1.6.0", "lightly.utils.lars", "LARS")
TORCH_OPTIMIZER = ("torch_optimizer==0.3.0", "torch_optimizer.lars", "LARS")
OPEN_LARS = ("open_lars==0.1.1", "open_lars.lars", "LARS")
MINERVA = ("minerva==0.3.11b0", "minerva.optimizers.lars", "LARS")
PYTORCH_OPTIMIZER = ("pytorch_optimizer==4.1.0", "pytorch_optimizer.optimizer.lars", "LARS")
TIMM_LARS = ("timm==1.0.31", "timm.optim.lars", "Lars")
TIMM_LAMB = ("timm==1.0.31", "timm.optim.lamb", "Lamb")
TORCH_OPTIMIZER_LAMB = ("torch_optimizer==0.3.0", "torch_optimizer.lamb", "Lamb")
PYTORCH_OPTIMIZER_LAMB = ("pytorch_optimizer==4.1.0", "pytorch_optimizer.optimizer.lamb", "Lamb")

SHAPES = {"matrix": (6, 5), "kernel": (4, 3, 2, 3), "bias": (6,)}
EXCLUDED = {"layer_adaptation": False, "weight_decay": 0.0}
FOR_LARS = {"lr": 0.5, "momentum": 0.8, "weight_decay": 0.05}
FOR_LAMB = {"lr": 0.05, "weight_decay": 0.05}


def layers():
    generator = torch.Generator().manual_seed(0)
    return {
        name: Parameter(torch.randn(s, generator=generator, dtype=torch.float64))
        for name, s in SHAPES.items()
    }


def groups(params, excluded=("bias",), named=False, **options):
    """The adapted layers, and those that are not, with options of their own."""

    def entries(names):
        return [(name, params[name]) if named else params[name] for name in names]

    adapted = [name for name in params if name not in excluded]
    apart = [{"params": entries(excluded), **options}] if excluded else []
    return [{"params": entries(adapted)}, *apart]


def walk(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params.values():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()


def read_again(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_goes_on(theirs, params, ours, own):
    """Load the state dict of a peer without a warning, and step with both."""
    walk(theirs, params, range(3))
    for name, p in params.items():
        own[name].data.copy_(p.detach())
    ours.load_state_dict(read_again(theirs.state_dict()))
    walk(theirs, params, range(3, 6))
    walk(ours, own, range(3, 6))
    torch.testing.assert_close(own, params, rtol=1e-12, atol=1e-13)


LARS_ROWS = {
    "lightly": (LIGHTLY, {"trust_coefficient": 0.02}, {}),
    "lightly with nesterov": (LIGHTLY, {"trust_coefficient": 0.02, "nesterov": True}, {}),
    "torch_optimizer": (TORCH_OPTIMIZER, {"trust_coefficient": 0.02, "dampening": 0.1}, {}),
    "timm": (TIMM_LARS, {"trust_coeff": 0.02, "nesterov": True}, {}),
    "timm LARC": (TIMM_LARS, {"trust_coeff": 0.02, "trust_clip": True}, {}),
    "pytorch_optimizer": (PYTORCH_OPTIMIZER, {"trust_coefficient": 0.02}, {"eps": 0.0}),
    "open_lars": (OPEN_LARS, {"trust_coefficient": 0.02}, {"lr_in_momentum": True}),
    "minerva": (MINERVA, {"eta": 0.02, "epsilon": 1e-6}, {"lr_in_momentum": True}),
}
ADAPTS_ALL, DECAYS_ALL = {"minerva"}, {"open_lars"}


@pytest.mark.parametrize("row", LARS_ROWS)
@pytest.mark.parametrize("named", [True, False])
def test_lars_continues_from_another(row, named):
    (requirement, module, name), theirs, ours = LARS_ROWS[row]
    build = getattr(peer(requirement, module), name)
    params, own = layers(), layers()
    excluded = () if row in ADAPTS_ALL else ("bias",)
    apart = {"layer_adaptation": False} if row in DECAYS_ALL else EXCLUDED
    own_group = {key: value for key, value in apart.items() if key != "layer_adaptation"}
    assert_goes_on(
        build(groups(params, excluded, **own_group), **FOR_LARS, **theirs),
        params,
        LARS(groups(own, excluded, named, **apart), lr=9.0, weight_decay=0.9, **ours),
        own,
    )


def test_lars_continues_from_the_moments_of_barlow_twins_under_their_names():
    """Which are `mu` and `eta`: with what else the paper's code keeps, as it stands in no package."""
    params, own = layers(), layers()
    ours = LARS(groups(own, **EXCLUDED), denominator="decayed_gradient", eps=0.0)
    twin = LARS(groups(params, **EXCLUDED), denominator="decayed_gradient", eps=0.0, trust_coefficient=0.02)
    walk(twin, params, range(2))
    for name, p in params.items():
        own[name].data.copy_(p.detach())
    saved = twin.state_dict()
    state = {number: {"mu": of_layer["momentum_buffer"]} for number, of_layer in saved["state"].items()}
    kept = ("lr", "weight_decay", "momentum", "params")
    saved_groups = [{**{key: group[key] for key in kept}, "eta": 0.02} for group in saved["param_groups"]]
    ours.load_state_dict({"state": copy.deepcopy(state), "param_groups": saved_groups})
    walk(twin, params, range(2, 4))
    walk(ours, own, range(2, 4))
    torch.testing.assert_close(own, params, rtol=0.0, atol=0.0)


LAMB_ROWS = {
    "timm": (TIMM_LAMB, {}, {}),
    "timm with a clip": (TIMM_LAMB, {"trust_clip": True, "max_grad_norm": None}, {}),
    "timm, decoupled": (TIMM_LAMB, {"decoupled_decay": True, "bias_correction": False}, {}),
    "torch_optimizer": (TORCH_OPTIMIZER_LAMB, {}, {"bias_correction": False, "max_weight_norm": 10.0}),
    "pytorch_optimizer": (
        PYTORCH_OPTIMIZER_LAMB,
        {"adam_debias": True},
        {"bias_correction": False, "max_weight_norm": 10.0, "trust_eps": 1e-6},
    ),
    "pytorch_optimizer, coupled": (
        PYTORCH_OPTIMIZER_LAMB,
        {"adam_debias": True, "weight_decouple": False},
        {"bias_correction": False, "max_weight_norm": 10.0, "trust_eps": 1e-6},
    ),
}


@pytest.mark.parametrize("row", LAMB_ROWS)
def test_lamb_continues_from_another(row):
    (requirement, module, name), theirs, ours = LAMB_ROWS[row]
    build = getattr(peer(requirement, module), name)
    params, own = layers(), layers()
    excluded, apart = (("bias",), {"weight_decay": 0.0}) if row.startswith("timm") else ((), {})
    options = EXCLUDED if excluded else {}
    assert_goes_on(
        build(groups(params, excluded, **apart), **FOR_LAMB, **theirs),
        params,
        LAMB(groups(own, excluded, **options), lr=9.0, **ours),
        own,
    )


@pytest.mark.parametrize(("requirement", "module", "name"), [LIGHTLY, TORCH_OPTIMIZER, TIMM_LARS])
def test_warns_of_a_momentum_that_a_peer_did_not_adapt_without_decay(requirement, module, name):
    build = getattr(peer(requirement, module), name)
    params = layers()
    theirs = build(list(params.values()), lr=0.1, momentum=0.9)
    walk(theirs, params, range(2))
    with pytest.warns(
        UserWarning, match="a group with weight_decay=0, which .* not adapt: .* without trust ratios"
    ):
        LARS(layers().values()).load_state_dict(theirs.state_dict())


def test_warns_of_an_unsupported_option_of_timm():
    params = layers()
    lamb = getattr(peer(*TIMM_LAMB[:2]), TIMM_LAMB[2])(list(params.values()), caution=True)
    walk(lamb, params, range(1))
    with pytest.warns(UserWarning, match="caution=True in the state dict is not supported here"):
        LAMB(layers().values()).load_state_dict(lamb.state_dict())


@pytest.fixture(scope="module")
def bitsandbytes():
    """By class: the layers after some steps, the state dict then, and the layers after some more."""
    peer("bitsandbytes==0.50.2", "bitsandbytes.optim.lars")  # or the test is skipped
    try:
        (seen,) = on_ranks(1, bitsandbytes_states.seen, str(PEERS / "bitsandbytes-0.50.2"), limit=120)
    except RankError as error:
        pytest.skip(f"bitsandbytes cannot be run: {str(error)[-300:]}")
    return seen


AS_BITSANDBYTES = {"denominator": "momentum", "trust_coefficient": 0.02, "trust_clip": 1.0}


@pytest.mark.parametrize("name", ["LARS", "PytorchLARS"])
def test_lars_continues_from_bitsandbytes(name, bitsandbytes):
    weights, saved, expected = bitsandbytes[name]
    params = [Parameter(w) for w in weights]
    lars = LARS(params, eps=0.0, **AS_BITSANDBYTES)
    lars.load_state_dict(saved)
    steps = range(bitsandbytes_states.STEPS, 2 * bitsandbytes_states.STEPS)
    torch.testing.assert_close(bitsandbytes_states.walk(lars, steps), expected, rtol=1e-5, atol=1e-6)


def test_lamb_continues_from_bitsandbytes(bitsandbytes):
    weights, saved, expected = bitsandbytes["LAMB"]
    lamb = LAMB([Parameter(w) for w in weights], bias_correction=False, trust_clip=1.0)
    lamb.load_state_dict(saved)
    lr = lamb.param_groups[0]["lr"]
    for t in range(bitsandbytes_states.STEPS, 2 * bitsandbytes_states.STEPS):
        lamb.param_groups[0]["lr"] = lr * (1 - 0.999 ** (t + 1)) ** 0.5 / (1 - 0.9 ** (t + 1))
        walked = bitsandbytes_states.walk(lamb, [t])
    torch.testing.assert_close(walked, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "optimizer_class", "eight_bit_class"), [("LARS", LARS, LARS8bit), ("LAMB", LAMB, LAMB8bit)]
)
def test_8_bit_state_of_bitsandbytes_matches_32_bits_within_quantization_error(
    name, optimizer_class, eight_bit_class, bitsandbytes
):
    weights, saved, _ = bitsandbytes[f"{name}8bit"]
    options = {"denominator": "momentum"} if optimizer_class is LARS else {}
    params = [Parameter(w) for w in weights]
    whole = optimizer_class(params, **options)
    whole.load_state_dict(saved)
    # The gradients of the first steps are known, and of these the moments are made.
    gradients = []
    for step in range(bitsandbytes_states.STEPS):
        generator = torch.Generator().manual_seed(100 + step)
        gradients.append(torch.randn(params[0].shape, generator=generator))
    if optimizer_class is LAMB:
        moment = torch.zeros(params[0].shape)
        for g in gradients:
            moment = 0.999 * moment + 0.001 * g * g
        actual = whole.state[params[0]]["exp_avg_sq"]
        assert ((actual - moment).norm() / moment.norm()).item() < 0.02
        assert whole.state[params[0]]["step"] == bitsandbytes_states.STEPS
    assert {value.dtype for state in whole.state.values() for value in state.values()} == {torch.float32}
    key = "exp_avg" if optimizer_class is LAMB else "momentum_buffer"
    floats = whole.state[params[0]][key]
    needs_torchao()
    packed = eight_bit_class(params, **options)
    packed.load_state_dict(saved)
    in_eight_bits = packed.state[params[0]][key]
    assert in_eight_bits.codes.dtype == torch.uint8
    assert ((in_eight_bits.dequantize() - floats).norm() / floats.norm()).item() < 0.02


def test_a_momentum_of_bitsandbytes_is_known_to_be_unscaled(bitsandbytes):
    for name in ("LARS", "LARS8bit", "PytorchLARS"):
        weights, saved, _ = bitsandbytes[name]
        with pytest.warns(
            UserWarning, match="bitsandbytes' LARS, which scales the update.*without trust ratios"
        ):
            LARS([Parameter(w) for w in weights]).load_state_dict(saved)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_the_moments_of_adamw_in_bitsandbytes_load_with_a_warning_about_the_rate(name, bitsandbytes):
    weights, saved, _ = bitsandbytes[name]
    lamb = LAMB([Parameter(w) for w in weights])
    with pytest.warns(UserWarning, match="has no option of LAMB: .* rate 0.001 .* 0.05"):
        lamb.load_state_dict(saved)
    assert lamb.state[lamb.param_groups[0]["params"][0]]["step"] == bitsandbytes_states.STEPS


def test_a_state_of_bitsandbytes_that_may_be_squares_is_refused(bitsandbytes):
    weights, saved, _ = bitsandbytes["SGD"]
    lars = LARS([Parameter(w) for w in weights], lr=0.3)
    with pytest.raises(ValueError, match=r"must have 'momentum' in its groups, got .*'betas'"):
        lars.load_state_dict(saved)
    assert not lars.state
    assert lars.param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "match"),
    [
        (
            torch.optim.AdamW,
            LARS,
            r"'momentum' in its groups, .* saved by a different optimizer\? LAMB can load it",
        ),
        (
            LAMB,
            LARS,
            r"'momentum' in its groups, .* saved by a different optimizer\? LAMB can load it",
        ),
        (
            LARS,
            LAMB,
            r"'betas' in its groups, .* saved by a different optimizer\? LARS can load it",
        ),
        (torch.optim.RMSprop, LAMB, r"'betas' in its groups, .* saved by a different optimizer\?$"),
        (
            torch.optim.Adamax,
            LAMB,
            r"hold \['exp_avg', 'exp_avg_sq', 'step'\] .*'exp_inf'.* saved by a different",
        ),
        (torch.optim.Adagrad, LARS, "'momentum' in its groups"),
        (
            torch.optim.RMSprop,
            LARS,
            r"hold \['momentum_buffer'\] .*'square_avg'.* saved by a different optimizer",
        ),
    ],
)
def test_other_optimizers_are_refused_by_the_missing_key(saved_by, loaded_by, match):
    params = layers()
    options = {"momentum": 0.9} if saved_by is torch.optim.RMSprop and loaded_by is LARS else {}
    theirs = saved_by(list(params.values()), lr=0.1, **options)
    walk(theirs, params, range(2))
    saved = copy.deepcopy(theirs.state_dict())
    ours = loaded_by(list(layers().values()))
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=match):
        ours.load_state_dict(saved)
    assert ours.state_dict() == before
    torch.testing.assert_close(saved["state"], theirs.state_dict()["state"], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("checkpoint", [{"optimizer_states": [], "state_dict": {}}, {"state": {}}, {}])
def test_anything_but_an_optimizer_state_dict_is_refused(checkpoint):
    optimizer = LARS(list(layers().values()))
    with pytest.raises(ValueError, match=r"optimizer state dict, .* of checkpoint\[.optimizer_states.\]"):
        optimizer.load_state_dict(checkpoint)
