"""Warnings in real runs: layers that shrink or jump, and fast excluded parameters."""

import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_lars import (
    LAMB,
    LARS,
    BatchSizeScaling,
    LearningRateWarmup,
    ParamGroupSummary,
    TrustRatioMonitor,
    WarmupDecayLR,
    build_optimizer,
    recipes,
)
from tests.support.boring import Boring, boring, trainer


def warned(tmp_path, module, callbacks, **options):
    """Fit; return what it warned of, without what Lightning has to say."""
    fitting = trainer(tmp_path, **{"logger": CSVLogger(tmp_path), "callbacks": callbacks, **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitting.fit(module)
    ours = [str(each.message) for each in caught if "lightning_lars" in each.filename]
    return [message for message in ours if not message.startswith("The ")]


class Expert(Boring):
    """With a layer that the loss does not reach, but that has a gradient, as under FSDP1."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.expert = nn.Linear(4, 4)

    def on_before_optimizer_step(self, optimizer):
        self.expert.weight.grad = torch.zeros(4, 4)


SHRINKING = {
    "LARS": partial(LARS, lr=1.0, trust_coefficient=0.03, weight_decay=1e-4),
    "LARS, hardly any decay": partial(LARS, lr=1.0, trust_coefficient=0.03, weight_decay=1e-9, eps=0.0),
    "decayed gradient": partial(
        LARS, lr=1.0, trust_coefficient=0.03, weight_decay=1e-4, denominator="decayed_gradient"
    ),
    "momentum": partial(LARS, lr=1.0, trust_coefficient=0.03, weight_decay=1e-4, denominator="momentum"),
    "LAMB": partial(LAMB, lr=0.03, weight_decay=0.01),
    "LAMB, hardly any decay": partial(LAMB, lr=0.03, weight_decay=1e-9),
}


@pytest.mark.parametrize("rule", SHRINKING)
@pytest.mark.parametrize("log_every_n_steps", [1, 50])
def test_a_layer_without_a_gradient_that_shrinks_is_named_with_the_remedy(tmp_path, rule, log_every_n_steps):
    torch.manual_seed(0)
    module = Expert(optimizer=SHRINKING[rule])
    before = module.expert.weight.detach().norm()
    (message,) = warned(tmp_path, module, [TrustRatioMonitor()], log_every_n_steps=log_every_n_steps)
    assert module.expert.weight.norm() < 0.9 * before
    assert "weight decay alone moves, because they have no gradient: 'expert.weight' (" in message
    assert "Pass decoupled_weight_decay=True" in message
    assert "net." not in message


@pytest.mark.parametrize("rule", SHRINKING)
def test_the_remedy_keeps_the_layer_and_is_not_warned_of(tmp_path, rule):
    torch.manual_seed(0)
    module = Expert(optimizer=partial(SHRINKING[rule], decoupled_weight_decay=True))
    before = module.expert.weight.detach().clone()
    messages = warned(tmp_path, module, [TrustRatioMonitor()], log_every_n_steps=1)
    # That of the smallest decay is lost in rounding, which is told.
    assert messages == [] or ("hardly" in rule and "weights that do not move" in messages[0])
    lr, decay = (SHRINKING[rule].keywords[key] for key in ("lr", "weight_decay"))
    torch.testing.assert_close(module.expert.weight.detach(), (1 - lr * decay) ** 8 * before)


class Sometimes(Expert):
    """Reaches the layer in every second step."""

    def training_step(self, batch, batch_idx):
        self.unreached = batch_idx % 2 == 1
        return super().training_step(batch, batch_idx) + self.expert(batch).pow(2).mean()

    def on_before_optimizer_step(self, optimizer):
        if self.unreached:
            super().on_before_optimizer_step(optimizer)


def test_an_expert_that_is_reached_often_enough_is_not_warned_of(tmp_path):
    torch.manual_seed(0)
    module = Sometimes(optimizer=SHRINKING["LARS"])
    assert warned(tmp_path, module, [TrustRatioMonitor()], log_every_n_steps=2) == []


def test_the_share_of_layers_without_a_gradient_is_logged(tmp_path):
    torch.manual_seed(0)
    fitting = trainer(
        tmp_path,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        max_steps=2,
        callbacks=[TrustRatioMonitor()],
    )
    fitting.fit(Expert(optimizer=SHRINKING["LAMB"]))
    assert fitting.callback_metrics["trust_ratio/by_decay_alone"] == pytest.approx(1 / 3)


class Zero(Boring):
    """Its last layer starts at zero, as the B of LoRA."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        nn.init.zeros_(self.net[2].weight)


class Times(Callback):
    """Notes how much has been warned of before each batch."""

    def __init__(self, caught):
        self.caught, self.number = caught, []

    def on_train_batch_start(self, *_):
        self.number.append(sum("weights were all zero" in str(each.message) for each in self.caught))


FROM_ZERO = {
    "LARS": (partial(LARS, lr=1.0), "SGD", "0.01"),
    "LARS, momentum": (partial(LARS, lr=1.0, denominator="momentum"), "SGD", "0.01"),
    "larc": (partial(LARS, lr=1.0, trust_clip="larc"), "SGD", "0.01"),
    "LAMB": (partial(LAMB, lr=0.1), "Adam", "0.1"),
}


@pytest.mark.parametrize("rule", FROM_ZERO)
def test_a_layer_that_starts_at_zero_is_named_in_that_step(tmp_path, rule):
    optimizer, plain, clip = FROM_ZERO[rule]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        times = Times(caught)
        trainer(tmp_path, logger=CSVLogger(tmp_path), callbacks=[times, TrustRatioMonitor()]).fit(
            Zero(optimizer=optimizer, excluded_lr=0.01)
        )
    assert times.number == [0] + [1] * 7
    (message,) = (str(each.message) for each in caught if "weights were all zero" in str(each.message))
    lr = optimizer.keywords["lr"]
    assert f"with their learning rate in that step: 'net.2.weight' ({lr:g})" in message
    assert f"was that of plain {plain}, at a rate that may" in message
    assert f"Pass trust_clip={clip}, which" in message


SLOW_FROM_ZERO = {
    "clipped": partial(LARS, lr=1.0, trust_clip=0.01),
    "slow LARS": partial(LARS, lr=0.5),
    "clipped LAMB": partial(LAMB, lr=0.1, trust_clip=0.1),
    "slow LAMB": partial(LAMB, lr=0.05),
}


@pytest.mark.parametrize("rule", SLOW_FROM_ZERO)
def test_a_layer_that_starts_at_zero_slowly_is_not_warned_of(tmp_path, rule):
    module = Zero(optimizer=SLOW_FROM_ZERO[rule], excluded_lr=0.01)
    assert warned(tmp_path, module, [TrustRatioMonitor()], max_steps=2) == []


def test_a_layer_that_starts_near_zero_does_not_jump_and_is_reported_as_far_from_the_others(tmp_path):
    torch.manual_seed(0)
    module = Zero(optimizer=partial(LARS, lr=1.0))
    nn.init.constant_(module.net[2].weight, 1e-8)
    messages = warned(tmp_path, module, [TrustRatioMonitor()], log_every_n_steps=1)
    (message,) = (each for each in messages if "trust ratios far from that of the median layer" in each)
    assert "'net.2.weight'" in message
    assert module.net[2].weight.abs().max() < 1e-7


def test_its_first_step_is_slow_in_a_warmup(tmp_path):
    module = Zero(optimizer=partial(LARS, lr=3.0), excluded_lr=0.01)
    assert warned(tmp_path, module, [LearningRateWarmup(8), TrustRatioMonitor()]) == []


def test_a_zero_layer_that_is_added_later_is_named_in_its_first_step(tmp_path):
    class Growing(Boring):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.lora = nn.Linear(4, 2, bias=False)
            nn.init.zeros_(self.lora.weight)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + (self.lora(batch) - 1).pow(2).mean() if batch_idx > 3 else loss

        def configure_optimizers(self):
            return build_optimizer(self.net, LARS, lr=1.0)

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 4:
                self.trainer.optimizers[0].add_param_group({"params": [("lora.weight", self.lora.weight)]})

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        times = Times(caught)
        trainer(tmp_path, logger=CSVLogger(tmp_path), callbacks=[times, TrustRatioMonitor()]).fit(
            Growing(optimizer=LARS)
        )
    assert times.number == [0] * 5 + [1] * 3
    assert any("'lora.weight' (1)" in str(each.message) for each in caught)


def test_without_alerts_nothing_is_said_and_no_first_step_read(tmp_path):
    module = Zero(optimizer=partial(LARS, lr=3.0))
    assert warned(tmp_path, module, [TrustRatioMonitor(alerts=False)]) == []


EXCLUDED = {
    "LARS": (partial(LARS, lr=3.0, trust_coefficient=1e-4), "plain SGD, which rarely trains above 1, though"),
    "LAMB": (partial(LAMB, lr=0.06), "plain Adam, which rarely trains above 0.05, and the first"),
}
CALLBACKS = {
    "monitor": [TrustRatioMonitor],
    "summary": [ParamGroupSummary],
    "both": [ParamGroupSummary, TrustRatioMonitor],
}


@pytest.mark.parametrize("rule", EXCLUDED)
@pytest.mark.parametrize("by", CALLBACKS)
@pytest.mark.parametrize("is_tensor", [False, True])
def test_fast_excluded_parameters_are_reported_once_with_the_remedy(tmp_path, rule, by, is_tensor):
    optimizer, words = EXCLUDED[rule]
    lr = optimizer.keywords["lr"]
    if is_tensor:
        optimizer = partial(optimizer, lr=torch.tensor(lr))
    callbacks = [callback() for callback in CALLBACKS[by]]
    messages = warned(tmp_path, boring(optimizer), callbacks, max_epochs=2)
    (message,) = (each for each in messages if "excluded parameters" in each)
    assert f"{rule} moves excluded parameters (4 of them) at a learning rate of {lr:g} so far." in message
    assert words in message
    assert f"excluded_lr={'0.05' if rule == 'LARS' else '0.01'}, or excluded_lr_scale" in message


@pytest.mark.parametrize("by", CALLBACKS)
@pytest.mark.parametrize(
    ("lr", "options"),
    [(3.0, {"excluded_lr": 0.05}), (3.0, {"excluded_lr_scale": 0.01}), (1.0, {})],
    ids=["excluded_lr", "excluded_lr_scale", "default"],
)
def test_a_separate_rate_is_the_remedy(tmp_path, by, lr, options):
    module = boring(partial(LARS, lr=lr), **options)
    assert warned(tmp_path, module, [callback() for callback in CALLBACKS[by]]) == []


@pytest.mark.parametrize("by", CALLBACKS)
def test_the_peak_of_the_rates_that_steps_used_counts(tmp_path, by):
    def messages(*scaling):
        callbacks = [*scaling, LearningRateWarmup(3), *(callback() for callback in CALLBACKS[by])]
        schedule = partial(WarmupDecayLR, warmup_steps=0, decay="polynomial", power=2)
        module = boring(partial(LARS, lr=0.8, trust_coefficient=0.01), lr_scheduler=schedule)
        return warned(tmp_path, module, callbacks)

    (message,) = messages(BatchSizeScaling(1))
    # Scaled by 4, in a warmup of 3 steps, and a decay that begins with the second.
    rates = [0.8 * 4 * min(1, step / 3) * (1 - (step - 1) / 8) ** 2 for step in range(1, 9)]
    shown = message.split("at a learning rate of ")[1].split(" so far")[0]
    assert max(rates) == rates[2] > 1.7
    assert float(shown) in [float(f"{max(rates[:i]):.4g}") for i in range(1, 9)]
    assert messages() == []


@pytest.mark.parametrize(
    "configure",
    [
        lambda module: build_optimizer(module, LARS, lr=3.0, exclude="*"),
        lambda module: LARS([{"params": module.parameters(), "layer_adaptation": False}], lr=3.0),
        lambda module: build_optimizer(module, torch.optim.SGD, lr=3.0),
        lambda module: LARS(module.parameters(), lr=3.0),
    ],
    ids=["all excluded", "no adaptation", "SGD", "nothing excluded"],
)
def test_plain_or_adapted_groups_raise_no_warning(tmp_path, configure):
    class Configured(Boring):
        def configure_optimizers(self):
            return configure(self)

    assert warned(tmp_path, Configured(optimizer=LARS), [ParamGroupSummary()]) == []


@pytest.mark.parametrize(
    "recipe", [recipes.simclr(4096, 1), recipes.barlow_twins(2048, 1)], ids=["SimCLR", "BT"]
)
def test_published_recipes_are_reported_as_such(tmp_path, recipe):
    torch.manual_seed(0)
    messages = warned(tmp_path, Boring(**recipe), [ParamGroupSummary()], max_steps=12, max_epochs=2)
    # That of Barlow Twins has a rate of its own for what is excluded.
    assert len(messages) == (recipe["excluded_lr_scale"] == 1.0)
    assert all("ResNets with batch normalization were published so (SimCLR" in each for each in messages)
