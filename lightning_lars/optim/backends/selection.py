"""Selects the back end of a batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import Algorithm
from lightning_lars.optim.backends.choice import uses_triton, warn_of_triton_failure, why_not_fused
from lightning_lars.optim.backends.eager import Eager
from lightning_lars.optim.batches import Batch
from lightning_lars.optim.state.plain import PlainState, checked_moments


def select_backend(
    batch: Batch, algorithm: type[Algorithm], state: PlainState, name: Callable[[Tensor], str]
) -> type[Eager]:
    """Return a fused back end if one supports the step of a batch, else the unfused one.

    Args:
        batch: The layers.
        algorithm: The algorithm of the optimizer.
        state: How the state is stored between steps.
        name: Returns the name of a parameter, for errors.

    Raises:
        RuntimeError: If no fused back end supports the step and ``fused=True``, or if the state has another
            device or shape than its layer.
    """
    part, fused = batch.weights[0], batch.group["fused"]
    is_compiled = torch.compiler.is_compiling()
    moments = [] if is_compiled else checked_moments(batch, algorithm, name)
    if fused is False:
        return Eager
    on_gpu = uses_triton(part)
    reason = state.why_not_in_triton(batch) if on_gpu else _why_not_on_cpu(batch, algorithm)
    reason = reason or why_not_fused(batch.weights, batch.grads, state.plain_moments(moments))
    if reason is not None and fused:
        names = ", ".join(repr(name(p)) for p in batch.params[:3])
        raise RuntimeError(
            f"fused=True, but {reason} (parameters {names} ...): pass fused=None, which uses fused "
            "kernels where they are supported"
        )
    if reason is not None:
        if on_gpu and not is_compiled:
            warn_of_triton_failure(part.device, part.dtype)
        return Eager
    if on_gpu:
        from lightning_lars.optim.backends.triton import Triton

        return Triton
    backend: type[Eager] = algorithm.cpu or Eager
    return backend


def _why_not_on_cpu(batch: Batch, algorithm: type[Algorithm]) -> str | None:
    if algorithm.cpu is None:
        return f"torch has no fused CPU kernel for {algorithm.__name__}"
    reason: str | None = algorithm.cpu.why_not(algorithm, batch.h)
    return reason
