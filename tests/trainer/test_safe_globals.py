"""Which classes and functions a process may load from checkpoints of modules with LargeBatchMixin."""

import pickle
from functools import partial

import pytest
import pytorch_lightning
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.optim import lr_scheduler
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals, safe_globals

import lightning_lars.optim
from lightning_lars import LAMB, LARS, LAMB8bit, LargeBatchMixin, LARS8bit, WarmupDecayLR, recipes
from lightning_lars.cli import LargeBatchCLI
from lightning_lars.mixin import LRSchedulerCallable, OptimizerCallable
from tests.support.boring import Boring, Plain, boring, trainer
from tests.support.checkpoints import safely
from tests.support.ranks import on_ranks
from tests.workers.safe_globals import load


class OwnLARS(LARS):
    pass


class OwnScheduler(lr_scheduler.LRScheduler):
    def get_lr(self):
        return self.base_lrs


def own_function(groups):
    return LARS(groups, lr=0.5)


def half(step):
    return 0.5


class Wider(Boring):
    """A subclass of a subclass, with a load_from_checkpoint around that of its base."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()

    @classmethod
    def load_from_checkpoint(cls, *args, **kwargs):
        return super().load_from_checkpoint(*args, **kwargs)


class OfOtherRoot(LargeBatchMixin, pytorch_lightning.LightningModule):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.layer = nn.Linear(2, 2)


# What hyperparameters name, and whether a process that has only imported the package loads them.
KNOWN = {
    "of this package": [getattr(lightning_lars.optim, name) for name in lightning_lars.optim.__all__],
    "with arguments": [partial(each, lr=0.5) for each in (LARS, LAMB, LARS8bit, LAMB8bit)],
    "of torch": [torch.optim.SGD, partial(torch.optim.AdamW, betas=(0.8, 0.9))],
    "a partial of a partial": [partial(partial(LARS, lr=0.5), momentum=0.8)],
}
SCHEDULERS = [
    partial(WarmupDecayLR, warmup_steps=2, total_steps=10),
    partial(lr_scheduler.StepLR, step_size=3),
    lr_scheduler.ExponentialLR,
    partial(torch.optim.swa_utils.SWALR, swa_lr=0.1),
]
OWN = {
    "OwnLARS": {"optimizer": OwnLARS},
    "own_function": {"optimizer": own_function},
    "OwnScheduler": {"lr_scheduler": partial(OwnScheduler, last_epoch=-1)},
    "half": {"lr_scheduler": partial(lr_scheduler.LambdaLR, lr_lambda=[half, half])},
}


@pytest.fixture(autouse=True)
def _as_in_a_new_process():
    before = get_safe_globals()
    clear_safe_globals()
    yield
    clear_safe_globals()
    add_safe_globals(before)


def saved(path, module):
    """Save a module as a Trainer does, and forget what the process was given."""
    fit = trainer(path.parent)
    fit.strategy.connect(module)
    fit.save_checkpoint(path)
    clear_safe_globals()
    return path


def flat(builders):
    """Return what partials are of, innermost first, as partials of equal content are not equal."""
    return [[*flat([each.func]), each.keywords] if isinstance(each, partial) else each for each in builders]


@pytest.mark.parametrize("kind", KNOWN)
def test_optimizers_that_hyperparameters_name_load(tmp_path, kind):
    for optimizer in KNOWN[kind]:
        path = saved(tmp_path / "a.ckpt", boring(optimizer))
        loaded = safely(Boring.load_from_checkpoint, path)
        assert flat([loaded.hparams["optimizer"]]) == flat([optimizer])


@pytest.mark.parametrize("lr_scheduler", SCHEDULERS)
def test_schedulers_that_hyperparameters_name_load(tmp_path, lr_scheduler):
    path = saved(tmp_path / "a.ckpt", boring(lr_scheduler=lr_scheduler))
    loaded = safely(Boring.load_from_checkpoint, path)
    assert flat([loaded.hparams["lr_scheduler"]]) == flat([lr_scheduler])


@pytest.mark.filterwarnings("ignore:lightning_lars.schedules is deprecated")
def test_a_scheduler_loads_from_where_it_was_in_the_first_release(tmp_path, monkeypatch):
    scheduler = partial(WarmupDecayLR, warmup_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(WarmupDecayLR, "__module__", "lightning_lars.schedules")
        path = saved(tmp_path / "a.ckpt", boring(lr_scheduler=scheduler))
    loaded = safely(Boring.load_from_checkpoint, path)
    assert loaded.hparams["lr_scheduler"].func is WarmupDecayLR
    # From now on by `ckpt_path` of a Trainer too, as the module has been given it.
    assert torch.load(path, weights_only=True)["hyper_parameters"]["lr_scheduler"].func is WarmupDecayLR


def test_recipes_a_subclass_of_a_subclass_and_the_other_root_load(tmp_path):
    path = saved(tmp_path / "recipe.ckpt", Boring(**recipes.lars(batch_size=256)))
    assert safely(Boring.load_from_checkpoint, path).hparams["optimizer"].func is LARS
    path = saved(tmp_path / "wider.ckpt", Wider(optimizer=partial(LAMB8bit, lr=0.1)))
    assert safely(Wider.load_from_checkpoint, path).hparams["optimizer"].func is LAMB8bit
    module = OfOtherRoot(optimizer=partial(LAMB, lr=0.1))
    fit = pytorch_lightning.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    fit.strategy.connect(module)
    fit.save_checkpoint(tmp_path / "other.ckpt")
    clear_safe_globals()
    loaded = safely(OfOtherRoot.load_from_checkpoint, tmp_path / "other.ckpt")
    assert loaded.hparams["optimizer"].func is LAMB


class FromYAML(LargeBatchMixin, Plain):
    """Its optimizer and scheduler are arguments of the command line."""

    def __init__(
        self, optimizer: OptimizerCallable = LARS, lr_scheduler: LRSchedulerCallable | None = None
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.save_hyperparameters()


@pytest.mark.parametrize("cli_class", [LightningCLI, LargeBatchCLI])
def test_checkpoints_of_the_cli_load(tmp_path, cli_class):
    """A CLI saves class paths and arguments, and what it gives the module are functions of jsonargparse."""
    arguments = ["--model.optimizer=LAMB", "--model.optimizer.lr=0.25", "--model.lr_scheduler=WarmupDecayLR"]
    arguments += ["--model.lr_scheduler.warmup_steps=1", "--trainer.max_steps=2"]
    options = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"trainer_defaults": options, "save_config_callback": None, "seed_everything_default": 0}
    cli = cli_class(FromYAML, args=["fit", *arguments], **options)
    cli.trainer.save_checkpoint(tmp_path / "a.ckpt")
    clear_safe_globals()
    loaded = safely(FromYAML.load_from_checkpoint, tmp_path / "a.ckpt")
    for p, q in zip(cli.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q)
    loaded.trainer = cli.trainer
    optimizer = loaded.configure_optimizers()["optimizer"]
    assert (type(optimizer), optimizer.defaults["lr"]) == (LAMB, 0.25)


@pytest.mark.parametrize("name", OWN)
def test_user_classes_are_refused_with_the_class_and_the_remedy_named(tmp_path, name):
    path = saved(tmp_path / "a.ckpt", Boring(**OWN[name]))
    with pytest.raises(pickle.UnpicklingError, match=rf"torch\.serialization\.safe_globals.*{name}"):
        safely(Boring.load_from_checkpoint, path)
    assert get_safe_globals() == []
    with safe_globals([globals()[name]]):  # as the error says
        safely(Boring.load_from_checkpoint, path)


def test_a_load_leaves_what_was_allowed_before_and_what_the_module_was_given(tmp_path):
    path = saved(tmp_path / "a.ckpt", boring(partial(LAMB, lr=0.1)))
    add_safe_globals([partial, OwnLARS])
    safely(Boring.load_from_checkpoint, path)
    assert set(get_safe_globals()) == {partial, OwnLARS, LAMB}
    with pytest.raises(FileNotFoundError):
        safely(Boring.load_from_checkpoint, tmp_path / "none.ckpt")
    assert set(get_safe_globals()) == {partial, OwnLARS, LAMB}


@pytest.mark.parametrize("name", OWN)
def test_a_process_that_gave_a_module_its_classes_loads_them_by_ckpt_path(tmp_path, name):
    module = Boring(**OWN[name])
    fit = trainer(tmp_path)
    fit.fit(module)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    clear_safe_globals()
    fresh = Boring(**OWN[name])
    safely(trainer(tmp_path, max_epochs=3).fit, fresh, ckpt_path=tmp_path / "a.ckpt")
    assert fresh.trainer.current_epoch == 3


def test_a_module_that_was_given_another_optimizer_loads_by_load_from_checkpoint(tmp_path):
    """As in a script for evaluation, which builds the module without its optimizer."""
    module = boring(partial(LAMB, lr=0.1), lr_scheduler=SCHEDULERS[0])
    fit = trainer(tmp_path)
    fit.fit(module)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    clear_safe_globals()
    resuming = trainer(tmp_path, max_epochs=3)
    with pytest.raises(
        pickle.UnpicklingError, match=r"(?s)(?=.*torch\.serialization\.safe_globals).*functools\.partial"
    ):
        safely(resuming.fit, Boring(), ckpt_path=tmp_path / "a.ckpt")
    loaded = safely(Boring.load_from_checkpoint, tmp_path / "a.ckpt")
    safely(resuming.fit, loaded, ckpt_path=tmp_path / "a.ckpt")
    assert resuming.current_epoch == 3


def test_a_module_allows_its_classes_in_the_process_that_it_was_sent_to(tmp_path):
    sent = pickle.dumps(boring(partial(OwnLARS, lr=0.1), lr_scheduler=OwnScheduler))
    clear_safe_globals()
    pickle.loads(sent)
    assert set(get_safe_globals()) == {partial, OwnLARS, OwnScheduler}


def test_only_classes_that_can_be_found_by_name_are_allowed():
    class Inside(LARS):
        pass

    big = torch.zeros(1)
    boring(lambda groups: LARS(groups, lr=float(big)))
    boring(Inside)
    boring(partial(Inside, lr=0.1))
    assert get_safe_globals() == [partial]


def test_load_from_checkpoint_is_refused_on_an_instance(tmp_path):
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        boring().load_from_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.distributed
def test_a_new_process_is_allowed_nothing_by_the_import_and_loads(tmp_path):
    optimizers = {"a.ckpt": partial(LARS8bit, lr=0.1), "b.ckpt": torch.optim.SGD, "c.ckpt": OwnLARS}
    for name, optimizer in optimizers.items():
        scheduler = partial(WarmupDecayLR, warmup_steps=2, total_steps=9)
        saved(tmp_path / name, boring(optimizer, lr_scheduler=scheduler))
    (loaded,) = on_ranks(1, load, [tmp_path / name for name in optimizers])
    first, second, refused = loaded.values()
    assert (first, second) == ("LARS8bit", "SGD")
    assert "torch.serialization.safe_globals" in refused
    assert "OwnLARS" in refused
