"""The lines of docs/with_your_library.md work with the library that they are for, where it is installed."""

import pytest
import torch
from torch import nn

from lightning_lars import LAMB, LARS, LargeBatchMixin, WarmupDecayLR, build_optimizer, param_groups
from tests.support.page import groups, lines_for


class Sentences(torch.utils.data.Dataset):
    """Random tokens, whose first one decides the label."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = torch.randint(0, 64, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": (tokens[0] > 31).long()}


def tiny_bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("way", ["optimizers", "create_optimizer"])
def test_the_trainer_of_transformers_adapts_layers_and_not_norms(tmp_path, way):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    names = {
        "LAMB": LAMB,
        "build_optimizer": build_optimizer,
        "Trainer": transformers.Trainer,
        "model": tiny_bert(),
        "dataset": Sentences(),
        "arguments": transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=16,
            num_train_epochs=1,
            warmup_steps=2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
    }
    if way == "optimizers":
        exec(lines_for("transformers"), names)
        trainer = names["trainer"]
    else:
        exec(lines_for("transformers", 1), names)
        trainer = names["LargeBatchTrainer"](
            names["model"], names["arguments"], train_dataset=names["dataset"]
        )
    before = {name: p.detach().clone() for name, p in names["model"].named_parameters()}
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    for name, (is_adapted, decay) in groups(optimizer).items():
        is_excluded = "LayerNorm" in name or name.endswith("bias")
        assert (is_adapted, decay) == ((False, 0.0) if is_excluded else (True, 0.01)), name
    assert set(optimizer.trust_ratios()) == {
        name for name, (adapted, _) in groups(optimizer).items() if adapted
    }
    assert all((p != before[name]).any() for name, p in names["model"].named_parameters())


class Net(LargeBatchMixin, nn.Module):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


def test_hydra_builds_optimizer_and_schedule_of_the_mixin():
    hydra = pytest.importorskip("hydra.utils")
    omegaconf = pytest.importorskip("omegaconf")
    settings = hydra.instantiate(omegaconf.OmegaConf.create(lines_for("hydra")))
    optimizer = build_optimizer(
        Net(**settings).net, settings["optimizer"], excluded_lr=settings["excluded_lr"]
    )
    assert isinstance(optimizer, LARS)
    assert [group["lr"] for group in optimizer.param_groups] == [3.2, 0.05]
    assert isinstance(settings["lr_scheduler"](optimizer, total_steps=1000), WarmupDecayLR)


def test_the_registry_of_timm_builds_lamb_over_these_groups():
    # Elsewhere in the run, parts of timm may stand in for it.
    pytest.importorskip("torchvision", reason="timm needs it")
    pytest.importorskip("timm")
    names = {
        "LAMB": LAMB,
        "param_groups": param_groups,
        "model": nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)),
    }
    exec(lines_for("timm"), names)
    optimizer = names["optimizer"]
    assert isinstance(optimizer, LAMB)
    assert groups(optimizer) == {
        "0.weight": (True, 0.02),
        "0.bias": (False, 0.0),
        "1.weight": (False, 0.0),
        "1.bias": (False, 0.0),
    }
