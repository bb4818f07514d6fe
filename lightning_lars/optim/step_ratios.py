"""The trust ratios of one step, from the norms of whole layers."""

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import Algorithm, Hyperparameters
from lightning_lars.optim.backends.eager import dtype_of_step
from lightning_lars.optim.distributed_norms import Norms
from lightning_lars.optim.state.plain import States, number_of
from lightning_lars.optim.trust_ratio import TrustRatios

Ratios = tuple[Tensor, ...] | list[TrustRatios[float]]
"""The trust ratios of several layers; those in tensors are a plain tuple, because torch 2.11 cannot compile a
step that stores a generic named tuple."""


class StepRatios:
    """Computes trust ratios and records them.

    Args:
        algorithm: The algorithm whose equations it evaluates.
        states: The state of each layer, by parameter.
    """

    def __init__(self, algorithm: type[Algorithm], states: States) -> None:
        self.algorithm, self.states = algorithm, states
        self.recorded: list[tuple[list[Tensor], Ratios]] = []
        """The adapted layers of each batch, and their trust ratios."""

    def record(self, params: list[Tensor], ratios: TrustRatios[Tensor]) -> Tensor:
        """Record the trust ratios of layers, and return those that the step uses."""
        self.recorded.append((params, tuple(ratios)))
        return ratios.ratio

    def from_norms(
        self, params: list[Tensor], norms: Norms, lr: float | Tensor, h: Hyperparameters
    ) -> Tensor:
        """Return the trust ratios of layers of one dtype, and record them."""
        w_norm, d_norm = norms
        if self.algorithm.norm_moment is not None:
            d_norm = self._advance_norm_moment(params, d_norm, self.algorithm.norm_moment, h)
        ratios = self.algorithm.ratio(w_norm, d_norm, lr, h)
        return self.record(params, ratios._replace(ratio=ratios.ratio.to(dtype_of_step(params[0]))))

    def _advance_norm_moment(
        self, params: list[Tensor], d_norm: Tensor, key: str, h: Hyperparameters
    ) -> Tensor:
        moments = [number_of(self.states, p, key) for p in params]
        averaged = self.algorithm.next_norm_moment(d_norm, torch.stack(moments).to(d_norm.dtype), h)
        torch._foreach_copy_(moments, list(averaged.unbind()))
        return averaged

    def in_floats(self, params: list[Tensor], norms: Norms, lr: float, h: Hyperparameters) -> list[float]:
        """Return the trust ratios as floats, which take a tenth of the time of tensors, and record them."""
        if self.algorithm.norm_moment is not None:
            ratios_of_step: list[float] = self.from_norms(params, norms, lr, h).tolist()
            return ratios_of_step
        ratio = self.algorithm.ratio
        w_norms, d_norms = norms
        pairs = zip(w_norms.tolist(), d_norms.tolist(), strict=True)
        ratios = [ratio(w_norm, d_norm, lr, h) for w_norm, d_norm in pairs]
        self.recorded.append((params, ratios))
        return [each.ratio for each in ratios]
