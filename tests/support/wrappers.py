"""Optimizers that wrap others, as packages implement them."""

from collections import OrderedDict, defaultdict

import torch
from torch.optim import Optimizer


class SAM(Optimizer):
    """Foret et al. 2021, arXiv:2010.01412: climb by rho, take the gradient, step from where it began."""

    def __init__(self, params, base_optimizer, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        grads = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        scale = 1 / (torch.stack(grads).norm() + 1e-12)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["climbed"] = p.grad * scale * group["rho"]
                p.add_(self.state[p]["climbed"])
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p].pop("climbed"))
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure=None):
        if closure is None:
            raise ValueError("SAM needs a closure")
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            with torch.enable_grad():
                closure()
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            loss = closure()
        self.second_step(zero_grad=True)
        return loss


class Lookahead(Optimizer):
    """Zhang et al. 2019, arXiv:1907.08610, every 2 steps, as most write it: without what it inherits."""

    def __init__(self, optimizer):
        self.defaults, self.state = {}, defaultdict(dict)
        self.fast = optimizer
        self.param_groups = optimizer.param_groups
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.fast.step(closure=closure)
        self.count += 1
        if self.count % 2 == 0:
            params = (p for group in self.param_groups for p in group["params"])
            for p, slow in zip(params, self.slow, strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss

    def zero_grad(self, set_to_none=True):
        self.fast.zero_grad(set_to_none)

    def state_dict(self):
        return self.fast.state_dict()

    def load_state_dict(self, state_dict):
        self.fast.load_state_dict(state_dict)


class HookedLookahead(Lookahead):
    """The same with step hooks of its own, and no others, as that of pytorch_optimizer."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._patch_step_function()

    def step(self, closure=None):
        return super().step(closure)


class Bare:
    """What Lightning takes for an optimizer, and torch does not."""

    def __init__(self, params, lr=0.1):
        self.param_groups = [{"params": list(params), "lr": lr}]
        self.defaults, self.state = {}, {}

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p in self.param_groups[0]["params"]:
            p -= self.param_groups[0]["lr"] * p.grad
        return loss

    def zero_grad(self, set_to_none=True):
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def state_dict(self):
        return {"state": {}, "param_groups": []}

    def load_state_dict(self, state_dict):
        pass


class OwnStep(Bare, Optimizer):
    """An Optimizer that does not call what it inherits."""
