"""Logs when and where Lightning logs its own metrics, and publishes to other callbacks.

Only private attributes of the Trainer tell when and at which step that is: they stand here alone.
"""

from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer


def is_logging(trainer: Trainer) -> bool:
    """Return whether Lightning logs its metrics after this batch (``log_every_n_steps``)."""
    return bool(trainer._logger_connector.should_update_logs)


def logged_step(trainer: Trainer) -> int:
    """Return the step on the x-axis of what Lightning logs now."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def log(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Give the metrics to every logger, at Lightning's own step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=logged_step(trainer))


def publish(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Put the metrics into ``trainer.callback_metrics``, where ``EarlyStopping`` and others look."""
    trainer.callback_metrics.update(
        {key: torch.tensor(value, device="cpu") for key, value in metrics.items()}
    )
