"""Logs metrics when and where Lightning logs its own, and publishes them to other callbacks.

Lightning exposes when and at which step it logs only through private attributes, which are confined to this
file.
"""

from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer


def is_logging(trainer: Trainer) -> bool:
    """Return whether Lightning logs its metrics after this batch (``log_every_n_steps``)."""
    return bool(trainer._logger_connector.should_update_logs)


def logged_step(trainer: Trainer) -> int:
    """Return the step at which Lightning logs its metrics now."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def log(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Log the metrics with every logger, at Lightning's own step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=logged_step(trainer))


def publish(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Put the metrics into ``trainer.callback_metrics``, where ``EarlyStopping`` and others read them."""
    trainer.callback_metrics.update(
        {key: torch.tensor(value, device="cpu") for key, value in metrics.items()}
    )
