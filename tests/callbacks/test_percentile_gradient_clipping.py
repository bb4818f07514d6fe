"""Clipping by a history of norms, in runs with known gradients."""

import csv
import math
from functools import partial

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from lightning_lars import LARS, GradientNoiseScale, PercentileGradientClipping
from lightning_lars.gradients.norms import gradient_norms, scale_gradients
from lightning_lars.gradients.percentile_clipping import PercentileClipping
from tests.support.boring import Boring, WithoutOptimizer, boring, trainer
from tests.support.ranks import on_ranks, once
from tests.support.reference import autoclip
from tests.support.small_network import deviation
from tests.workers.clipping import RUNS, train, train_under
from tests.workers.noise_scale import Linear, Module

PREFIX = "gradient_clipping/"


def norms_of(number, seed=0):
    return np.exp(np.random.default_rng(seed).standard_normal(number))


def scales_of(clipping, norms):
    return [clipping.scales(torch.tensor([norm], dtype=torch.float64)).item() for norm in norms]


@pytest.mark.parametrize("percentile", [0.0, 10.0, 37.5, 99.0])
@pytest.mark.parametrize("starts_full", [False, True])
def test_scales_match_the_paper(percentile, starts_full):
    norms = norms_of(60)
    clipping = PercentileClipping(percentile, 20, starts_full)
    wanted = [scale for _, scale in autoclip(norms, percentile, 20, starts_full)]
    assert scales_of(clipping, norms) == pytest.approx(wanted, rel=1e-12)
    assert min(wanted) < 0.99


@pytest.mark.parametrize("spoiled", [0.0, math.inf, math.nan])
def test_a_norm_that_is_zero_or_not_finite_is_not_kept(spoiled):
    norms = [*norms_of(9), spoiled, *norms_of(9, seed=1)]
    clipping = PercentileClipping(50.0, 5)
    scales = scales_of(clipping, norms)
    assert clipping.state().isfinite().all()
    wanted = [scale for _, scale in autoclip(norms, 50.0, 5)]
    assert scales == pytest.approx(wanted, rel=1e-12)
    assert scales[9] == (0.0 if spoiled == math.inf else 1.0)


def test_a_step_that_a_scaler_skips_keeps_no_norm_of_any_layer():
    clipping = PercentileClipping(50.0, 5)
    for norms in ([1.0, 2.0], [3.0, math.inf], [math.nan, 4.0], [0.0, 5.0]):
        clipping.scales(torch.tensor(norms))
    assert clipping.state()[:, 0].isfinite().sum() == 1
    assert clipping.state()[-2:, 1].tolist() == [2.0, 5.0]


def test_a_history_continues_with_another_length():
    first, second = norms_of(9), norms_of(9, seed=1)
    clipping = PercentileClipping(50.0, 7)
    scales_of(clipping, first)
    for length in (3, 12):
        other = PercentileClipping(50.0, length)
        other.load(clipping.state())
        wanted = [scale for _, scale in autoclip([*first[-7:], *second], 50.0, length)][7:]
        assert scales_of(other, second) == pytest.approx(wanted, rel=1e-12)


def test_no_step_reads_the_value_of_a_tensor():
    # One that holds nothing says so.
    clipping, norms = PercentileClipping(50.0, 5, starts_full=True), torch.ones(3, device="meta")
    for _ in range(2):
        scales = clipping.scales(norms)
    assert scales.shape == (3,)
    with pytest.raises(RuntimeError, match="meta"):
        clipping.read()


class Steep(Linear):
    """The mean of ``w . x``, whose gradient is the mean of x, of many sizes; steps are gradients."""

    optimizer = staticmethod(partial(torch.optim.SGD, lr=1.0))

    def __init__(self, batches=24, dtype=torch.float64, **kwargs):
        generator = np.random.default_rng(3)
        sizes = np.repeat(np.exp(generator.standard_normal(batches)), 4)[:, None]
        super().__init__(torch.as_tensor(sizes * generator.standard_normal((4 * batches, 4))), **kwargs)
        self.data = self.data.to(dtype)
        self.w, self.v = (nn.Parameter(p.detach().to(dtype)) for p in (self.w, self.v))

    def gradients(self, accumulated=1):
        """Of each step, for both parameters."""
        return self.data.double().numpy().reshape(-1, 4 * accumulated, 4).mean(1)


class SteepModule(Steep, lightning.pytorch.LightningModule):
    """For Trainers of lightning.pytorch."""


class Witness(Callback):
    """Notes the parameters after every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if not trainer.fit_loop._should_accumulate():
            self.values.append(torch.cat([pl_module.w, pl_module.v]).detach().double().numpy())


def fit(tmp_path, module, clipping, callbacks=(), ckpt_path=None, **options):
    """Train; return the steps that were taken."""
    witness = Witness()
    before = torch.cat([module.w, module.v]).detach().double().numpy()
    fitting = trainer(tmp_path, callbacks=[clipping, *callbacks, witness], **options)
    fitting.fit(module, ckpt_path=ckpt_path)
    steps = -np.diff([before, *witness.values], axis=0)
    return fitting, steps


def clipped(gradients, percentile, history=100, per_layer=False):
    """The gradients as they should come out."""
    layers = (slice(0, 3), slice(3, 4)) if per_layer else (slice(0, 4),)
    out = gradients.copy()
    for layer in layers:
        norms = np.linalg.norm(gradients[:, layer], axis=1)
        out[:, layer] *= np.array([scale for _, scale in autoclip(norms, percentile, history)])[:, None]
    return out


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("history", [100, 5])
def test_steps_use_clipped_gradients(tmp_path, accumulate, per_layer, history):
    module = SteepModule()
    clipping = PercentileGradientClipping(25.0, history, per_layer)
    fitting, steps = fit(tmp_path, module, clipping, accumulate_grad_batches=accumulate)
    gradients = module.gradients(accumulate)
    wanted = clipped(gradients, 25.0, history, per_layer)
    assert steps == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert not np.allclose(wanted, gradients)
    last = fitting.callback_metrics
    if not per_layer:
        norms = np.linalg.norm(gradients, axis=1)
        thresholds, scales = zip(*autoclip(norms, 25.0, history), strict=True)
        assert last == {}  # Lightning logs every 50 steps
        assert clipping.state_dict()["norms"][0][-1].item() == pytest.approx(norms[-1])
        assert len(thresholds) == len(scales) == len(steps)


def test_norms_are_unscaled_and_skipped_steps_not_kept_in_mixed_precision(tmp_path):
    class Overflows(SteepModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (1e38 if batch_idx == 5 else 1.0)

    class Fused(Overflows):
        optimizer = staticmethod(partial(torch.optim.SGD, lr=1.0, fused=True))

    for module_class in (Overflows, Fused):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        clipping = PercentileGradientClipping(25.0, history=8)
        module = module_class(dtype=torch.float32)
        _, steps = fit(tmp_path, module, clipping, plugins=plugin)
        assert scaler.get_scale() == 2.0**9
        gradients = np.delete(module.gradients(), 5, axis=0)
        assert np.delete(steps, 5, axis=0) == pytest.approx(clipped(gradients, 25.0, 8), rel=0.02, abs=2e-3)
        assert not steps[5].any()
        kept = clipping.state_dict()["norms"][0].flatten().numpy()
        assert kept == pytest.approx(np.linalg.norm(gradients[-8:], axis=1), rel=0.01)


def test_a_gradient_that_is_not_finite_does_not_enter_the_history(tmp_path):
    class Spoiled(SteepModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 7 else 1.0)

    clipping = PercentileGradientClipping(history=100)
    module = Spoiled()
    fit(tmp_path, module, clipping)
    norms = np.linalg.norm(np.delete(module.gradients(), 7, axis=0), axis=1)
    kept = clipping.state_dict()["norms"][0].flatten().numpy()
    assert kept[-23:] == pytest.approx(norms)
    assert np.isnan(kept[:-23]).all()


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_resumed_run_takes_the_same_steps(tmp_path, per_layer):
    clipping = partial(PercentileGradientClipping, 25.0, history=10, per_layer=per_layer)
    whole = clipping()
    _, steps = fit(tmp_path, SteepModule(), whole, max_epochs=2)
    half = clipping()
    fitting, _ = fit(tmp_path, SteepModule(), half)
    fitting.save_checkpoint(tmp_path / "after.ckpt")
    checkpoint = torch.load(tmp_path / "after.ckpt", weights_only=True)
    (state,) = [state for key, state in checkpoint["callbacks"].items() if "Percentile" in key]
    assert torch.equal(state["norms"][0], half.state_dict()["norms"][0])
    resumed = clipping()
    _, again = fit(tmp_path, SteepModule(), resumed, max_epochs=2, ckpt_path=tmp_path / "after.ckpt")
    assert np.array_equal(again[1:], steps[25:])
    assert torch.equal(resumed.state_dict()["norms"][0], whole.state_dict()["norms"][0])


def test_a_checkpoint_of_another_module_is_refused(tmp_path):
    fitting, _ = fit(tmp_path, SteepModule(), PercentileGradientClipping(per_layer=True))
    clipping = PercentileGradientClipping(per_layer=True)
    clipping.load_state_dict({"norms": [torch.zeros(100, 3)]})
    with pytest.raises(MisconfigurationException, match=r"norms of 3 layers .* has 2"):
        clipping.on_train_start(fitting, fitting.lightning_module)
    clipping.load_state_dict({"norms": [torch.zeros(100, 2)] * 2})
    with pytest.raises(MisconfigurationException, match=r"of 2 optimizers .* has 1"):
        clipping.on_train_start(fitting, fitting.lightning_module)


def test_loggers_get_norm_threshold_and_share_when_lightning_logs(tmp_path):
    logger, module = CSVLogger(tmp_path), SteepModule()
    fitting, _ = fit(tmp_path, module, PercentileGradientClipping(25.0), logger=logger, log_every_n_steps=6)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row[PREFIX + "norm"]]
    assert [int(row["step"]) for row in rows] == [5, 11, 17, 23]
    norms = np.linalg.norm(module.gradients(), axis=1)
    thresholds, scales = (np.array(each) for each in zip(*autoclip(norms, 25.0, 100), strict=True))
    for row in rows:
        step = int(row["step"])
        assert float(row[PREFIX + "norm"]) == pytest.approx(norms[step], rel=1e-6)
        assert float(row[PREFIX + "threshold"]) == pytest.approx(thresholds[step], rel=1e-6)
        share = (scales[step - 5 : step + 1] < 1).mean()
        assert float(row[PREFIX + "share_clipped"]) == pytest.approx(share)
    assert fitting.callback_metrics[PREFIX + "norm"] == pytest.approx(norms[-1], rel=1e-6)


def test_layer_by_layer_it_logs_medians(tmp_path):
    module = SteepModule()
    fitting, _ = fit(tmp_path, module, PercentileGradientClipping(25.0, per_layer=True), log_every_n_steps=1)
    smaller = min(np.linalg.norm(module.gradients()[-1, layer]) for layer in (slice(0, 3), slice(3, 4)))
    assert fitting.callback_metrics[PREFIX + "norm"] == pytest.approx(smaller)
    assert set(fitting.callback_metrics) == {PREFIX + key for key in ("norm", "threshold", "share_clipped")}


def test_other_callbacks_see_the_gradient_before_it_is_clipped(tmp_path):
    measured = []
    for callbacks in ([], [PercentileGradientClipping(0.0)]):
        options = {"accumulate_grad_batches": 2, "log_every_n_steps": 1}
        fitting = trainer(tmp_path, callbacks=[*callbacks, GradientNoiseScale(1)], **options)
        fitting.fit(Module())
        measured.append({k: v.item() for k, v in fitting.callback_metrics.items() if "noise" in k})
    assert measured[0] == measured[1]


def test_checkpoints_are_still_saved_last(tmp_path):
    clipping, saving = PercentileGradientClipping(), ModelCheckpoint(tmp_path)
    fitting = trainer(tmp_path, callbacks=[clipping, Witness(), saving], enable_checkpointing=True)
    fitting.fit(SteepModule())
    assert fitting.callbacks[-2:] == [clipping, saving]


class Adversarial(Boring):
    """Two optimizers, the second of which steps every other batch."""

    automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]

    def training_step(self, batch, batch_idx):
        for number, optimizer in enumerate(self.optimizers()):
            if batch_idx % (number + 1) == 0:
                optimizer.zero_grad()
                self.manual_backward((10.0**number) * self.net(batch).pow(2).mean())
                optimizer.step()


def test_every_optimizer_has_a_separate_history_in_manual_optimization(tmp_path):
    clipping = PercentileGradientClipping(50.0)
    fitting = trainer(tmp_path, callbacks=[clipping], log_every_n_steps=1)
    torch.manual_seed(0)
    fitting.fit(Adversarial(optimizer=partial(torch.optim.SGD, lr=0.1)))
    first, second = clipping.state_dict()["norms"]
    assert first.isfinite().sum() == 8
    assert second.isfinite().sum() == 4
    assert second.nanmean() > first.nanmean()
    shown = {key.rsplit("/", 1)[0] for key in fitting.callback_metrics}
    assert shown == {PREFIX + "SGD", PREFIX + "SGD-1"}


class Manual(SteepModule):
    """Steps by itself, in a way that a test chooses."""

    automatic_optimization = False

    def __init__(self, take_step):
        super().__init__()
        self.take_step = take_step

    def training_step(self, batch, batch_idx):
        def gradients():
            self.zero_grad()
            self.manual_backward(super(Manual, self).training_step(batch, batch_idx))

        self.take_step(self, gradients, batch_idx)


def step_of(own, gradients, which):
    """Take the step of an optimizer for which a function of the module looks."""
    gradients()
    which(own).step()


def now_and_then(own, gradients, batch_idx):
    gradients()
    own.optimizers(use_pl_optimizer=batch_idx % 3 > 0).step()


ROUND_LIGHTNING = {
    "use_pl_optimizer=False": lambda own, grads, _: step_of(
        own, grads, lambda own: own.optimizers(use_pl_optimizer=False)
    ),
    "optimizer.optimizer": lambda own, grads, _: step_of(own, grads, lambda own: own.optimizers().optimizer),
    "trainer.optimizers": lambda own, grads, _: step_of(own, grads, lambda own: own.trainer.optimizers[0]),
    "closure": lambda own, grads, _: own.optimizers().optimizer.step(grads),
    "closure by name": lambda own, grads, _: own.optimizers().optimizer.step(closure=grads),
    "now and then": now_and_then,
    "closure of Lightning": lambda own, grads, _: own.optimizers().step(grads),
}


@pytest.mark.parametrize("way", ROUND_LIGHTNING)
@pytest.mark.parametrize("per_layer", [False, True])
def test_steps_that_go_round_lightning_are_clipped_once(tmp_path, way, per_layer):
    module = Manual(ROUND_LIGHTNING[way])
    clipping = PercentileGradientClipping(25.0, 100, per_layer)
    fitting, steps = fit(tmp_path, module, clipping, log_every_n_steps=1)
    wanted = clipped(module.gradients(), 25.0, per_layer=per_layer)
    assert steps == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert PREFIX + "threshold" in fitting.callback_metrics
    assert not fitting.optimizers[0]._optimizer_step_pre_hooks


def test_steps_that_bypass_lightning_in_automatic_optimization_are_clipped(tmp_path):
    class Overridden(SteepModule):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            if batch_idx % 2:
                optimizer.optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()
                optimizer.optimizer.step()

    module = Overridden()
    _, steps = fit(tmp_path, module, PercentileGradientClipping(25.0))
    assert steps == pytest.approx(clipped(module.gradients(), 25.0), rel=1e-9, abs=1e-12)


class Wrapper(torch.optim.Optimizer):
    """As other packages write it: an Optimizer that leaves out its own __init__, and so has no hooks."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, {}

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_an_optimizer_without_hooks_is_clipped_where_lightning_steps_it(tmp_path):
    class Wrapped(SteepModule):
        optimizer = staticmethod(lambda params: Wrapper(torch.optim.SGD(params, lr=1.0)))

    module = Wrapped()
    _, steps = fit(tmp_path, module, PercentileGradientClipping(25.0))
    assert steps == pytest.approx(clipped(module.gradients(), 25.0), rel=1e-9, abs=1e-12)


class Trying(torch.optim.SGD):
    """Has steps of other names, as SAM."""

    def second_step(self):
        return torch.optim.SGD.step.__wrapped__(self)


@pytest.mark.parametrize(
    ("optimizer", "take_step", "name"),
    [
        (lambda params: Wrapper(torch.optim.SGD(params, lr=1.0)), lambda o: o.step(), "Wrapper"),
        (lambda params: Trying(params, lr=1.0), lambda o: o.second_step(), "Trying"),
    ],
)
def test_an_optimizer_whose_steps_cannot_be_observed_is_warned_of(tmp_path, optimizer, take_step, name):
    def unseen(own, gradients, batch_idx):
        gradients()
        take_step(own.optimizers(use_pl_optimizer=False))

    class Unseen(Manual):
        def configure_optimizers(self):
            return optimizer(self.parameters())

    module = Unseen(unseen)
    with pytest.warns(UserWarning, match=rf"clipped no gradient of {name}, which took no step that it could"):
        _, steps = fit(tmp_path, module, PercentileGradientClipping(25.0))
    assert steps == pytest.approx(module.gradients())


def test_layers_that_are_unfrozen_get_columns(tmp_path):
    class Tuned(Boring):
        def __init__(self):
            super().__init__(optimizer=partial(LARS, lr=1.0))
            self.backbone = self.net[0]

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    clipping = PercentileGradientClipping(per_layer=True)
    tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    fitting = trainer(tmp_path, callbacks=[clipping, tuning], max_epochs=2)
    fitting.fit(Tuned())
    (norms,) = clipping.state_dict()["norms"]
    assert norms.isfinite().sum(0).tolist() == [16] * 4 + [8] * 2


def test_sparse_gradients_and_parameters_without_one_are_taken(tmp_path):
    embedding, unused = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.ones(2))
    embedding(torch.tensor([1, 3, 3])).mul(torch.tensor([3.0, 4.0])).sum().backward()
    params = [embedding.weight, unused]
    norms = gradient_norms(params, {}, torch.device("cpu"))
    assert norms.tolist() == pytest.approx([math.sqrt(5) * 5, 0.0])
    before = embedding.weight.grad.to_dense()
    scale_gradients(params, torch.tensor([0.5, 1.0]))
    assert_close(embedding.weight.grad.to_dense(), 0.5 * before)
    scale_gradients(params, torch.tensor([0.5]))
    assert_close(embedding.weight.grad.to_dense(), 0.25 * before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_norms_of_half_precision_are_added_up_in_more(dtype):
    p = nn.Parameter(torch.zeros(300, 300, dtype=dtype))
    p.grad = torch.full_like(p, 300.0)
    (norm,) = gradient_norms([p], {}, torch.device("cpu"))
    assert norm.item() == pytest.approx(9e4, rel=1e-6)
    scale_gradients([p], torch.tensor([1 / 3], dtype=torch.float64))
    assert p.grad.unique().item() == pytest.approx(100, rel=torch.finfo(dtype).eps)


def test_nothing_is_read_back_between_logs(tmp_path):
    class Counts(PercentileGradientClipping):
        reads = 0

        def on_before_optimizer_step(self, *arguments):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                super().on_before_optimizer_step(*arguments)
            names = ("aten::_local_scalar_dense", "aten::item")
            type(self).reads += sum(event.name in names for event in profiler.events())

        def on_train_batch_end(self, *arguments):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                super().on_train_batch_end(*arguments)
            type(self).reads += sum(event.name == "aten::_local_scalar_dense" for event in profiler.events())

    for per_layer in (False, True):
        fit(tmp_path, SteepModule(batches=4), Counts(per_layer=per_layer))
        assert Counts.reads == 0


@pytest.mark.parametrize("options", [{"gradient_clip_val": 1.0}, {}], ids=str)
def test_it_warns_of_clipping_twice(tmp_path, options):
    optimizer = partial(LARS, lr=1.0, max_grad_norm=None if options else 2.0)
    fitting = trainer(tmp_path, callbacks=[PercentileGradientClipping()], **options)
    name = "gradient_clip_val=1.0" if options else "max_grad_norm=2.0"
    with pytest.warns(UserWarning, match=f"clipped twice: by PercentileGradientClipping.*{name}"):
        fitting.fit(boring(optimizer))


def test_deepspeed_is_refused(tmp_path):
    class DeepSpeedStrategy(SingleDeviceStrategy):
        """By this name it is known."""

    fitting = trainer(tmp_path, callbacks=[PercentileGradientClipping()], strategy=DeepSpeedStrategy("cpu"))
    with pytest.raises(MisconfigurationException, match="cannot clip under DeepSpeed"):
        fitting.fit(SteepModule())


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_without_an_optimizer_says_what_to_do(tmp_path):
    fitting = trainer(tmp_path, callbacks=[PercentileGradientClipping()])
    with pytest.raises(MisconfigurationException, match="got no optimizer: return one from"):
        fitting.fit(WithoutOptimizer(optimizer=LARS))


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda each: each.__name__)
@pytest.mark.parametrize("options", [{}, {"barebones": True}, {"fast_dev_run": 4}], ids=str)
def test_works_in_the_trainer_of_both_packages(tmp_path, package, options):
    module = type("Module", (Steep, package.LightningModule), {})()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    clipping = PercentileGradientClipping(25.0)
    fitting = package.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[clipping],
        **({} if options.get("barebones") else {"logger": False, "default_root_dir": tmp_path, **quiet}),
        **options,
    )
    fitting.fit(module)
    kept = clipping.state_dict()["norms"][0].isfinite().sum()
    assert kept == options.get("fast_dev_run", 24)


def test_a_second_fit_starts_over(tmp_path):
    clipping = PercentileGradientClipping(25.0)
    first = fit(tmp_path, SteepModule(), clipping)[1]
    second = fit(tmp_path, SteepModule(), clipping)[1]
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    "arguments",
    [
        {"percentile": 100.0},
        {"percentile": -1.0},
        {"percentile": "10"},
        {"history": 1},
        {"history": 2.0},
        {"per_layer": 1},
        {"starts_full": None},
    ],
    ids=str,
)
def test_arguments_that_break_their_rule_are_refused(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        PercentileGradientClipping(**arguments)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two ranks sees under a strategy."""
    folder = tmp_path_factory.mktemp("clipping")
    return once(lambda strategy: on_ranks(2, train_under, strategy, folder))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What one process sees."""
    folder = tmp_path_factory.mktemp("clipping")
    return {per_layer: train(folder, per_layer=per_layer, log_every_n_steps=1) for per_layer in (False, True)}


@pytest.mark.distributed
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("per_layer", [False, True])
def test_several_ranks_clip_by_the_norms_of_whole_gradients(two_ranks, one_process, run, per_layer):
    wanted = one_process[per_layer]
    moved = deviation(wanted["values"][0], wanted["values"][-1])
    first, second = (seen[per_layer] for seen in two_ranks(run))
    for seen in (first, second):
        for values, wanted_values in zip(seen["values"], wanted["values"], strict=True):
            assert deviation(values, wanted_values) < 1e-5 * moved
        assert_close(seen["norms"].double(), wanted["norms"].double(), rtol=1e-5, atol=0.0)
    assert torch.equal(first["norms"], second["norms"])


def test_the_reference_run_is_clipped(one_process):
    for seen in one_process.values():
        assert seen["logged"][PREFIX + "share_clipped"] > 0 or seen["norms"].isfinite().all()
    assert one_process[False]["norms"].shape == (4, 1)
    assert len(one_process[True]["norms"][0]) > 10
