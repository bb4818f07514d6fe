"""What a short run leaves unknown, in sentences."""

from collections.abc import Sequence

from lightning_lars.advice.parts import CriticalBatchSize, ParameterGroup
from lightning_lars.groups.excluded_rate import is_excluded
from lightning_lars.rules import counted

FEW_STEPS = 100
WIDE_ERROR = 0.25
"""Standard error, as a share of the noise scale, that is worth a sentence."""
DRIFT = 1.25
"""Change of the noise scale over the second half of the steps that is worth a sentence, as a factor."""
ALWAYS = (
    "Steps and samples are for the same training loss, with a learning rate tuned for every batch size "
    "(McCandlish et al. 2018, arXiv:1812.06162). Accuracy on new data was not measured, nor time or the "
    "memory of activations.",
    "Learning rates are where a search should start. The noise scale accounts for noise, not for curvature, "
    "which limits the rate of a large batch first. No rule is reliable beyond 16 times the batch size.",
)
NOT_MEASURED = (
    "The critical batch size was not measured: max_steps=0.",
    "The state of the module's own optimizer was not measured, because it has taken no step.",
)


def of_run(
    critical: CriticalBatchSize | None,
    *,
    measured_steps: int,
    max_steps: int,
    batch_size: int,
    is_in_warmup: bool,
    is_distributed: bool,
    begin: int = 0,
) -> tuple[str, ...]:
    """Describe what a run leaves unknown.

    Args:
        critical: The noise scale that it measured; None if none.
        measured_steps: The optimizer steps that it took.
        max_steps: The optimizer steps that it was meant to take.
        batch_size: Effective batch size of the module's own Trainer.
        is_in_warmup: Whether it ended before the learning rate had reached its peak.
        is_distributed: Whether there are several ranks.
        begin: Optimizer steps before these, which the checkpoint had taken; 0 without one.
    """
    sentences = list(_of_measurement(critical, measured_steps, max_steps))
    if critical is not None and critical.batch_size != batch_size:
        sentences.append(
            f"On one device the noise scale needs two micro-batches: the steps were measured at an effective "
            f"batch size of {critical.batch_size} by accumulation, in the schedule of steps of {batch_size}."
        )
    if is_in_warmup:
        sentences.append(
            "The learning rate had not reached its peak when the run ended: the noise scale is that of its "
            "warmup. Raise max_steps."
        )
    if is_distributed:
        sentences.append("The memory of state is that of one rank, which holds whole layers.")
    if critical is not None:
        which = f"those from step {begin} on" if begin else "the first steps of the run"
        again = "a later checkpoint" if begin else "a checkpoint"
        sentences.append(
            f"The noise scale is that of {which}. It usually grows as the loss falls, often by an order of "
            f"magnitude: measure again from {again} (ckpt_path)."
        )
    return (*sentences, *ALWAYS)


def of_rates(main: ParameterGroup | None, groups: Sequence[ParameterGroup]) -> list[str]:
    """Say whose learning rate is shown, if that depends on the group."""
    others = {group.lr for group in groups if group.lr is not None and not is_excluded({"name": group.name})}
    if main is None or len(others) < 2:
        return []
    return [
        f"Groups have different learning rates. The one shown is that of {main.name}, the largest group: "
        "scale the others by the same factor."
    ]


def _of_measurement(critical: CriticalBatchSize | None, measured_steps: int, max_steps: int) -> Sequence[str]:
    if critical is None:
        return [
            f"The critical batch size was not measured: of {counted(measured_steps, 'step')}, none had "
            "finite gradients from two or more micro-batches of one size. Raise max_steps, give the train "
            "loader two full batches or more in an epoch and drop_last=True, or pass batch_size."
        ]
    sentences = []
    if measured_steps < max_steps:
        sentences.append(f"The run ended after {measured_steps} of {max_steps} steps.")
    if measured_steps < FEW_STEPS:
        sentences.append(f"{counted(measured_steps, 'step')}: few for a noise scale. Raise max_steps.")
    if critical.b_simple is None:
        lost, other = ("gradient", "noise") if critical.squared_gradient <= 0 else ("noise", "gradient")
        sentences.append(
            f"The {lost} is lost in the {other}, so that there is no estimate of the critical batch size: "
            "raise max_steps."
        )
        return sentences
    error = critical.standard_error
    if error is None or error > WIDE_ERROR * critical.b_simple:
        sentences.append("The error of the noise scale is large: raise max_steps.")
    halfway = critical.history[(len(critical.history) - 1) // 2][1]
    if halfway is not None and not 1 / DRIFT < critical.b_simple / halfway < DRIFT:
        sentences.append(
            f"The noise scale was still changing, from {halfway:.3g} to {critical.b_simple:.3g} over the "
            "second half of the steps. Its error does not include that."
        )
    return sentences
