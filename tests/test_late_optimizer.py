"""Parameters that are replaced after the model exists: who trains them, who says so, who is silent."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

FIT = """fit --optimizer=SGD --optimizer.lr=0.1 --trainer.accelerator=cpu --trainer.devices=2
--trainer.strategy=ModelParallelStrategy --trainer.strategy.data_parallel_size=2
--trainer.strategy.tensor_parallel_size=1 --trainer.max_steps=2 --trainer.logger=false
--trainer.enable_checkpointing=false --trainer.enable_progress_bar=false --trainer.enable_model_summary=false
--trainer.use_distributed_sampler=false --seed_everything=0"""
WARMUP = ["--trainer.callbacks+=lightning_lars.LearningRateWarmup", "--trainer.callbacks.warmup_steps=1"]


def fit(tmp_path, cli, *more):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "tests.workers.late_optimizer", cli, *FIT.split(), *more]
    return subprocess.run(
        [*command, f"--trainer.default_root_dir={tmp_path / cli}"], cwd=root, capture_output=True, text=True
    )


def test_large_batch_cli_trains_what_the_stock_cli_silently_does_not(tmp_path):
    late, stock = fit(tmp_path, "LargeBatchCLI", *WARMUP), fit(tmp_path, "LightningCLI")
    assert late.stdout.count("6 of 6 moved") == 2, late.stderr
    assert stock.stdout.count("0 of 6 moved") == 2, stock.stderr


def test_a_callback_raises_where_the_stock_cli_would_train_nothing(tmp_path):
    result = fit(tmp_path, "LightningCLI", *WARMUP)
    assert result.returncode != 0
    assert "optimizer must hold parameters of the module, got SGD with none of Replaced" in result.stderr


def test_lars_trains_shards(tmp_path):
    result = fit(tmp_path, "LargeBatchCLI", "--optimizer=LARS")
    assert result.stdout.count("6 of 6 moved") == 2, result.stderr
