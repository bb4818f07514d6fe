"""DeepSpeed ZeRO is refused before training begins, and clipping twice raises a warning."""

import warnings
from functools import partial

import lightning.pytorch.strategies
import pytest
import pytorch_lightning.strategies
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import SGD

from lightning_lars import LAMB, LARS, ExcludeNormAndBias, build_optimizer
from lightning_lars.cli import LargeBatchCLI
from tests.support.boring import Boring, Plain, boring, trainer

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False}


class OwnOptimizer(Boring):
    def configure_optimizers(self):
        return LARS(self.parameters(), max_grad_norm=1.0)


class ZeRO(lightning.pytorch.strategies.DeepSpeedStrategy):
    """DeepSpeed's settings, without DeepSpeed and the GPU that it asks for."""

    def __init__(self, stage):
        self.config = {"zero_optimization": {"stage": stage}}


class ZeROOfTheOtherRoot(pytorch_lightning.strategies.DeepSpeedStrategy):
    def __init__(self, stage):
        self.config = {"zero_optimization": {"stage": stage}}


def attached(module, strategy, tmp_path):
    module.trainer = trainer(tmp_path)
    module.trainer.strategy.__class__, module.trainer.strategy.config = type(strategy), strategy.config
    return module


@pytest.mark.parametrize("strategy", [ZeRO, ZeROOfTheOtherRoot])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optimizer", [LARS, LAMB])
def test_the_mixin_refuses_zero_and_names_the_ways_out(tmp_path, strategy, stage, optimizer):
    module = attached(boring(optimizer), strategy(stage), tmp_path)
    with pytest.raises(MisconfigurationException, match=rf"ZeRO stage {stage}.*stage=0.*strategy='fsdp'"):
        module.configure_optimizers()


def test_the_cli_refuses_zero(tmp_path):
    arguments = ["--optimizer=lightning_lars.LARS", "--seed_everything=0"]
    cli = LargeBatchCLI(Plain, trainer_defaults=QUIET, args=arguments, run=False)
    attached(cli.model, ZeRO(2), tmp_path)
    with pytest.raises(MisconfigurationException, match="ZeRO stage 2"):
        cli.model.configure_optimizers()


def test_the_callback_refuses_zero(tmp_path):
    module = attached(boring(), ZeRO(1), tmp_path)
    module.trainer.strategy.optimizers = [LARS(module.parameters())]
    with pytest.raises(MisconfigurationException, match="ZeRO stage 1"):
        ExcludeNormAndBias().on_fit_start(module.trainer, module)


@pytest.mark.parametrize(("optimizer", "stage"), [(LARS, 0), (partial(SGD, lr=0.1), 2)])
def test_without_flat_layers_or_trust_ratios_zero_is_no_concern(tmp_path, optimizer, stage):
    module = attached(boring(optimizer), ZeRO(stage), tmp_path)
    assert len(module.configure_optimizers().param_groups) == 2


def clips_twice():
    return pytest.warns(UserWarning, match=r"clipped twice.*gradient_clip_val=2\.0.*max_grad_norm=1\.0")


def test_clipping_twice_warns(tmp_path):
    with clips_twice():
        trainer(tmp_path, gradient_clip_val=2.0, fast_dev_run=True).fit(
            boring(partial(LARS, max_grad_norm=1.0))
        )
    with clips_twice():
        trainer(tmp_path, gradient_clip_val=2.0, fast_dev_run=True, callbacks=[ExcludeNormAndBias()]).fit(
            OwnOptimizer()
        )


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 2.0}, {"gradient_clip_val": 0}])
def test_clipping_once_does_not(tmp_path, options):
    max_grad_norm = None if options.get("gradient_clip_val") else 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The '.*' does not have many workers")
        warnings.filterwarnings("ignore", "`isinstance")
        fitting = trainer(tmp_path, max_steps=1, log_every_n_steps=1, **options)
        fitting.fit(boring(partial(LARS, max_grad_norm=max_grad_norm)))
    assert fitting.global_step == 1


def test_without_a_trainer_there_is_nothing_to_check():
    module = boring(partial(LARS, max_grad_norm=1.0))
    assert len(module.configure_optimizers().param_groups) == len(build_optimizer(module, LARS).param_groups)
