"""What the steps of an optimizer take over from the last one."""

import torch

from lightning_lars.optim.plan import Plan


class Found:
    """Whether each step has found that nothing has changed, None for one that had no plan."""

    def __init__(self, monkeypatch):
        self.steps = []
        original = Plan.unchanged

        def unchanged(plan, *arguments):
            found = original(plan, *arguments)
            self.steps.append(found is not None)
            return found

        monkeypatch.setattr(Plan, "unchanged", unchanged)


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params.values():
        gradient = torch.randn(p.shape, generator=generator).to(p)
        # In place where there is one: so that only what a test changes moves.
        p.grad = gradient if p.grad is None else p.grad.copy_(gradient)
