"""A Lightning module and its optimizer's step compile without graph breaks, and train as in eager mode."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch._dynamo.utils import counters

from lightning_lars import LAMB, LARS, LearningRateWarmup, build_optimizer
from tests.support.releases import has
from tests.support.slow import slow_unless

pytestmark = pytest.mark.skipif(not has("torch>=2.7"), reason="torch 2.6 cannot compile a step")


class Classifier(LightningModule):
    """A small network, compiled as docs/performance.md says."""

    def __init__(self, optimizer_class, backend=None):
        super().__init__()
        self.optimizer_class, self.backend = optimizer_class, backend
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
        self.net = torch.compile(net, fullgraph=True, backend=backend) if backend else net

    def configure_optimizers(self):
        # Single operations, as torch.compile traces them.
        lr = torch.tensor(0.5)
        optimizer = build_optimizer(self, self.optimizer_class, lr=lr, weight_decay=0.01, fused=False)
        if self.backend:
            self.compiled_step = torch.compile(optimizer.step, fullgraph=True, backend=self.backend)
        return optimizer

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        if self.backend is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()
            self.compiled_step()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        data = torch.utils.data.TensorDataset(
            torch.randn(64, 8, generator=generator), torch.randint(4, (64,), generator=generator)
        )
        return torch.utils.data.DataLoader(data, batch_size=16)


def weights_after_training(module, tmp_path, callbacks):
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=callbacks,
    )
    trainer.fit(module)
    assert trainer.global_step == 8
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize(
    ("optimizer_class", "warms_up"),
    [slow_unless(warms_up == (each is LARS), each, warms_up) for each in (LARS, LAMB) for warms_up in (0, 1)],
)
def test_compiled_training_has_no_graph_breaks_and_matches_eager(optimizer_class, warms_up, tmp_path):
    def callbacks():
        return [LearningRateWarmup(warmup_steps=4)] if warms_up else []

    torch.compiler.reset()
    counters.clear()
    compiled = weights_after_training(Classifier(optimizer_class, "eager"), tmp_path, callbacks())
    assert counters["stats"]["unique_graphs"] >= 2
    assert not counters["graph_break"]
    eager = weights_after_training(Classifier(optimizer_class), tmp_path, callbacks())
    torch.compiler.reset()
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
