"""The mixin builds an optimizer that excludes norms and biases from adaptation."""

from functools import partial

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn

from lightning_lars import LAMB, LARS, LargeBatchMixin, NovoGrad
from tests.support.boring import Boring, boring, trainer
from tests.support.checkpoints import safely


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_equal_states(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(LARS, lr=1.0),
        LAMB,
        partial(NovoGrad, lr=1.0),
        partial(torch.optim.SGD, lr=0.1),
        torch.optim.AdamW,
    ],
)
def test_training_moves_every_layer(tmp_path, optimizer):
    module = boring(optimizer)
    before = snapshot(module)
    trainer(tmp_path).fit(module)
    after = snapshot(module)
    assert not [
        name for name in before if "num_batches" not in name and torch.equal(before[name], after[name])
    ]


def test_the_optimizer_holds_the_two_groups_with_names():
    adapted, excluded = boring(excluded_lr_scale=0.5).configure_optimizers().param_groups
    assert adapted["param_names"] == ["net.0.weight", "net.2.weight"]
    assert excluded["param_names"] == ["net.0.bias", "net.1.weight", "net.1.bias", "net.2.bias"]
    assert (adapted["lr"], excluded["lr"]) == (1.0, 0.5)


def test_lars_is_the_default():
    assert type(Boring().configure_optimizers()) is LARS


@pytest.mark.parametrize("switch", ["exclude_norm", "exclude_bias", "exclude_gain"])
def test_each_default_can_be_switched_off(switch):
    adapted = {"exclude_norm": ["net.1.weight"], "exclude_bias": ["net.0.bias", "net.2.bias"],
               "exclude_gain": ["gate"]}[switch]  # fmt: skip
    module = boring(**{switch: False})
    module.gate = nn.Parameter(torch.ones(3))
    names = module.configure_optimizers().param_groups[0]["param_names"]
    assert set(names) == {"net.0.weight", "net.2.weight", *adapted}
    with pytest.raises(ValueError, match=f"{switch} must be True or False, got 'no'"):
        boring(**{switch: "no"})


def test_exclusions_are_passed_on():
    module = boring(exclude=["net.2.*"], exclude_bias=False)
    assert module.configure_optimizers().param_groups[0]["param_names"] == ["net.0.weight", "net.0.bias"]


@pytest.mark.parametrize("root", [lightning.pytorch, pytorch_lightning])
def test_the_wrong_order_of_bases_raises(root):
    with pytest.raises(TypeError, match="Net must have LargeBatchMixin before LightningModule in its bases"):
        type("Net", (root.LightningModule, LargeBatchMixin), {})


def test_a_subclass_of_a_module_with_the_wrong_order_raises_too():
    class Parent(lightning.pytorch.LightningModule):
        pass

    with pytest.raises(
        TypeError, match=r"Child must have LargeBatchMixin before .* got \(Parent, LargeBatch"
    ):
        type("Child", (Parent, LargeBatchMixin), {})


def test_a_module_of_the_standalone_package_trains(tmp_path):
    class Net(LargeBatchMixin, pytorch_lightning.LightningModule):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.net = nn.Linear(4, 1)

        training_step = Boring.training_step
        train_dataloader = Boring.train_dataloader

    module = Net(optimizer=partial(LARS, lr=1.0))
    before = snapshot(module)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    pytorch_lightning.Trainer(
        accelerator="cpu", max_steps=2, default_root_dir=tmp_path, enable_checkpointing=False, **options
    ).fit(module)
    assert not torch.equal(before["net.weight"], module.net.weight)


@pytest.mark.parametrize("optimizer", ["LARS", LARS([torch.zeros(1, requires_grad=True)]), 3])
def test_an_optimizer_that_cannot_be_called_raises(optimizer):
    with pytest.raises(
        TypeError, match=r"optimizer must be an optimizer class or a callable .*partial\(LARS"
    ):
        Boring(optimizer=optimizer)


def test_a_callable_that_returns_no_optimizer_raises(tmp_path):
    with pytest.raises(TypeError, match=r"optimizer must return a torch\.optim\.Optimizer, got \[\{'params'"):
        trainer(tmp_path).fit(boring(list))


def test_a_module_without_trainable_parameters_raises(tmp_path):
    with pytest.raises(ValueError, match="module must have at least one parameter with requires_grad=True"):
        trainer(tmp_path).fit(boring().requires_grad_(False))


def test_an_argument_of_the_next_class_reaches_it():
    class Named(lightning.pytorch.LightningModule):
        def __init__(self, name: str):
            super().__init__()
            self.called = name

    class Net(LargeBatchMixin, Named):
        pass

    assert Net("net", optimizer=LAMB).called == "net"


@pytest.mark.parametrize(
    "optimizer", [LAMB, partial(LARS, lr=0.5, trust_clip="larc"), partial(torch.optim.AdamW, lr=0.1)]
)
def test_load_from_checkpoint_restores_weights_and_hyperparameters(tmp_path, optimizer):
    module = boring(optimizer, width=5, exclude=("net.2.*",))
    fit = trainer(tmp_path)
    fit.fit(module)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    loaded = safely(Boring.load_from_checkpoint, tmp_path / "a.ckpt")
    assert_equal_states(snapshot(module), snapshot(loaded))
    assert loaded.hparams["width"] == 5
    expected, actual = module.configure_optimizers(), loaded.configure_optimizers()
    assert type(actual) is type(expected)
    for left, right in zip(expected.param_groups, actual.param_groups, strict=True):
        assert {k: v for k, v in left.items() if k != "params"} == {
            k: v for k, v in right.items() if k != "params"
        }


@pytest.mark.parametrize("optimizer", [partial(LARS, lr=1.0, weight_decay=0.1), partial(LAMB, lr=0.1)])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, optimizer):
    straight = boring(optimizer)
    trainer(tmp_path, max_epochs=3).fit(straight)

    first = trainer(tmp_path, max_epochs=1)
    first.fit(boring(optimizer))
    first.save_checkpoint(tmp_path / "a.ckpt")
    resumed = boring(optimizer)
    trainer(tmp_path, max_epochs=3).fit(resumed, ckpt_path=tmp_path / "a.ckpt")
    assert_equal_states(snapshot(straight), snapshot(resumed))


def test_the_closure_of_lightning_sees_the_trust_ratio(tmp_path):
    """A wrapper that scaled gradients before the closure would leave plain SGD."""
    lars, sgd = boring(partial(LARS, lr=0.1)), boring(partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    for module in (lars, sgd):
        trainer(tmp_path, max_steps=1).fit(module)
    assert torch.equal(lars.net[0].bias, sgd.net[0].bias)
    assert not torch.equal(lars.net[0].weight, sgd.net[0].weight)


def test_an_excluded_lr_scale_out_of_range_raises_before_training():
    with pytest.raises(ValueError, match="excluded_lr_scale must be above 0 and finite, got -1"):
        Boring(excluded_lr_scale=-1)


class Backbone(Boring):
    """A module with a part that BackboneFinetuning knows by its name."""

    def __init__(self, **kwargs):
        torch.manual_seed(0)
        super().__init__(**kwargs)
        self.backbone = self.net[0]

    def on_train_epoch_start(self):
        # As BackboneFinetuning leaves it when it resumes later than it unfroze.
        if self.current_epoch == 2:
            self.backbone.requires_grad_(False)


def unfreezing():
    return BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False)


def test_layers_that_finetuning_unfreezes_join_the_optimizer(tmp_path):
    module = Backbone(optimizer=partial(LARS, lr=1.0))
    trainer(tmp_path, max_epochs=2, callbacks=[unfreezing()]).fit(module)
    assert len(module.trainer.optimizers[0].param_groups) == 3


@pytest.mark.parametrize("optimizer", [partial(LARS, lr=1.0), partial(LAMB, lr=0.1)])
def test_layers_that_finetuning_unfroze_resume(tmp_path, optimizer):
    straight = Backbone(optimizer=optimizer)
    trainer(tmp_path, max_epochs=3, callbacks=[unfreezing()]).fit(straight)

    first = trainer(tmp_path, max_epochs=2, callbacks=[unfreezing()])
    first.fit(Backbone(optimizer=optimizer))
    first.save_checkpoint(tmp_path / "a.ckpt")
    resumed = Backbone(optimizer=optimizer)
    trainer(tmp_path, max_epochs=3, callbacks=[unfreezing()]).fit(resumed, ckpt_path=tmp_path / "a.ckpt")
    assert_equal_states(snapshot(straight), snapshot(resumed))
