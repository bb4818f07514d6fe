"""Batch sizes that grow by the same increment, or by the same factor, again and again."""

from lightning_lars.learning_rate.batch_scaling import check_batch_size
from lightning_lars.rules import POSITIVE_WHOLE, as_int, is_whole, require


def additive_growth(start: int, end: int, increment: int, every: int) -> dict[int, int]:
    """Return a ramp: a batch size that grows by the same increment, again and again.

    ::

        batch size(t) = min(start + increment * floor(t / every), end)

    GPT-3 and Megatron-LM ramp up the batch size like this over the first samples (Brown et al. 2020).

    Args:
        start: Effective batch size at first, at least 1.
        end: Effective batch size at last, at least ``start``.
        increment: Samples by which it grows, at least 1.
        every: Steps, or samples, between two increments, at least 1.

    Returns:
        The batch sizes, by the step or sample from which on they apply.

    Raises:
        ValueError: If an argument breaks its rule.

    Example:
        >>> from lightning_lars.learning_rate import additive_growth
        >>> additive_growth(start=32, end=128, increment=32, every=1000)
        {0: 32, 1000: 64, 2000: 96, 3000: 128}
    """
    start, end, every = _checked_growth(start, end, every)
    increment = check_batch_size("increment", increment)
    sizes = [*range(start, end, increment), end]
    return {n * every: size for n, size in enumerate(sizes)}


def multiplicative_growth(start: int, end: int, factor: int, every: int) -> dict[int, int]:
    """Return a batch size that is multiplied by the same factor, again and again.

    ::

        batch size(t) = min(start * factor ** floor(t / every), end)

    Smith et al. 2018, arXiv:1711.00489: multiplying the batch size where the learning rate would be divided
    follows the same learning curve in fewer steps.

    Args:
        start: Effective batch size at first, at least 1.
        end: Effective batch size at last, at least ``start``.
        factor: An integer, at least 2.
        every: Steps, or samples, from one multiplication to the next, at least 1.

    Returns:
        The batch sizes, by the step or sample from which on they apply.

    Raises:
        ValueError: If an argument breaks its rule.

    Example:
        >>> from lightning_lars.learning_rate import multiplicative_growth
        >>> multiplicative_growth(start=32, end=256, factor=2, every=1000)
        {0: 32, 1000: 64, 2000: 128, 3000: 256}
    """
    start, end, every = _checked_growth(start, end, every)
    factor = as_int(factor)
    require("factor", "an integer, at least 2", factor, is_whole(factor) and factor >= 2)
    sizes = []
    while start < end:
        sizes.append(start)
        start *= factor
    return {n * every: size for n, size in enumerate([*sizes, end])}


def growth(
    start: int | None, end: int | None, increment: int | None, factor: int | None, every: int | None
) -> dict[int, int]:
    """Return the additive or the multiplicative growth that the arguments describe.

    Raises:
        ValueError: If they describe none, or one of them breaks its rule.
    """
    if start is not None and end is not None and every is not None:
        if increment is not None and factor is None:
            return additive_growth(start, end, increment, every)
        if factor is not None and increment is None:
            return multiplicative_growth(start, end, factor, every)
    raise ValueError(
        "batch_sizes must be given, or start, end, every, and either increment or factor, got "
        f"start={start}, end={end}, every={every}, increment={increment}, factor={factor}"
    )


def _checked_growth(start: int, end: int, every: int) -> tuple[int, int, int]:
    start, end = check_batch_size("start", start), check_batch_size("end", end)
    require("end", f"at least start={start}", end, end >= start)
    return start, end, POSITIVE_WHOLE.checked_int("every", every)
