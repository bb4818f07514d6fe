"""Parameters that are replaced after the model exists: who trains them, and who raises."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import RankError, on_ranks
from tests.workers.late_optimizer import fit

pytestmark = pytest.mark.distributed

FIT = """fit --optimizer=SGD --optimizer.lr=0.1 --trainer.accelerator=cpu --trainer.devices=2
--trainer.strategy=ModelParallelStrategy --trainer.strategy.data_parallel_size=2
--trainer.strategy.tensor_parallel_size=1 --trainer.max_steps=2 --trainer.logger=false
--trainer.enable_checkpointing=false --trainer.enable_progress_bar=false --trainer.enable_model_summary=false
--trainer.use_distributed_sampler=false --seed_everything=0"""
WARMUP = ["--trainer.callbacks+=lightning_lars.LearningRateWarmup", "--trainer.callbacks.warmup_steps=1"]
ALL, NONE = [True] * 6, [False] * 6


def test_large_batch_cli_trains_layers_that_the_stock_cli_silently_does_not():
    assert on_ranks(2, fit, "LargeBatchCLI", [*FIT.split(), *WARMUP, "--optimizer=LARS"]) == [ALL, ALL]
    assert on_ranks(2, fit, "LightningCLI", FIT.split()) == [NONE, NONE]


def test_a_callback_raises_where_the_stock_cli_would_train_nothing():
    with pytest.raises(RankError, match="must hold parameters of the module, got SGD with none of Replaced"):
        on_ranks(2, fit, "LightningCLI", [*FIT.split(), *WARMUP])


@pytest.mark.slow
def test_the_first_process_starts_the_second_by_the_same_command():
    command = [sys.executable, "-m", "tests.workers.late_optimizer", *FIT.split()]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("6 of 6 moved") == 2, done.stderr
