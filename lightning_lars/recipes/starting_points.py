"""Starting points for tasks without published numbers, from ``docs/large_batch_study.md``."""

from functools import partial

from lightning_lars.learning_rate.batch_scaling import check_batch_size, scaling_factor
from lightning_lars.optim import LAMB, LARS
from lightning_lars.recipes.recipe import Recipe, recipe


def lars(batch_size: int, warmup_steps: int = 20) -> Recipe:
    """Starting point for LARS, scaled with the batch size.

    ::

        lr           = 6    * sqrt(batch_size / 128)        for norms and biases: 0.05 at any batch size
        weight_decay = 5e-4 * sqrt(batch_size / 128)        so that lr * weight_decay * steps stays the same
        trust_clip   = 0.02

    Momentum 0.9, linear warmup, linear decay to 0. The evidence is Fashion-MNIST at batch 128 and 2,048
    (``docs/large_batch_study.md``): a CNN with batch norm, an MLP without norms and a transformer all train
    near their best at the rate for batch 2,048. The CNN is best at 2 to 3 times that rate; the MLP degrades
    between 1.3 and 2.7 times. ``trust_clip`` keeps networks with norms training where the rate is far too
    high, and costs up to a point where the rate is right. Search around ``lr`` in factors of 2.

    Args:
        batch_size: Effective batch size, at least 1.
        warmup_steps: Optimizer steps of warmup, for example a tenth of the run; fewer than its steps.

    Raises:
        ValueError: If ``batch_size`` is below 1.

    Example:
        >>> from lightning_lars.recipes import lars
        >>> lars(batch_size=2048)["optimizer"].keywords["lr"]
        24.0
    """
    factor = _square_root_of_128(batch_size)
    optimizer = partial(LARS, lr=6 * factor, momentum=0.9, weight_decay=5e-4 * factor, trust_clip=0.02)
    return recipe(optimizer, warmup_steps, excluded_lr=0.05, decay="polynomial", power=1.0)


def lamb(batch_size: int, warmup_steps: int = 20) -> Recipe:
    """Starting point for LAMB, scaled with the batch size.

    ::

        lr           = 0.0075 * sqrt(batch_size / 128)      for norms and biases: 0.01 at any batch size
        weight_decay = 0.01   * sqrt(batch_size / 128)      so that lr * weight_decay * steps stays the same
        trust_clip   = 0.5

    Gradients are clipped to a norm of 1; linear warmup, linear decay to 0. From the same evidence as
    :func:`lars`, with more to gain than with LARS for networks without norms or with layer norms: all three
    networks train near their best at the rate for batch 2,048. ``trust_clip`` keeps weights from growing
    without bound where the rate is too high for a network, and hardly changes a run at the rate given here.

    Args:
        batch_size: Effective batch size, at least 1.
        warmup_steps: Optimizer steps of warmup, for example a tenth of the run; fewer than its steps.

    Raises:
        ValueError: If ``batch_size`` is below 1.
    """
    factor = _square_root_of_128(batch_size)
    optimizer = partial(
        LAMB, lr=0.0075 * factor, weight_decay=0.01 * factor, trust_clip=0.5, max_grad_norm=1.0
    )
    return recipe(optimizer, warmup_steps, excluded_lr=0.01, decay="polynomial", power=1.0)


def _square_root_of_128(batch_size: int) -> float:
    return scaling_factor(check_batch_size("batch_size", batch_size), 128, "sqrt")
