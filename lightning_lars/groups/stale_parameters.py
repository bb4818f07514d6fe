"""Detects an optimizer whose parameters have been replaced in the module."""

from torch import nn
from torch.optim import Optimizer


def check_holds_parameters(optimizer: Optimizer, module: nn.Module) -> None:
    """Raise if an optimizer holds none of a module's parameters, and so would not train it.

    This happens if it was built before ``configure_model`` or a strategy replaced the parameters.

    Raises:
        ValueError: If the optimizer holds none of the module's parameters.
    """
    params = set(module.parameters())
    if not any(p in params for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"optimizer must hold parameters of the module, got {type(optimizer).__name__} with none of "
            f"{type(module).__name__}: it was built before they were replaced (configure_model, FSDP2, "
            "tensor parallelism). Build it in configure_optimizers, or use LargeBatchCLI, which builds it "
            "after configure_model and the strategy have run"
        )
