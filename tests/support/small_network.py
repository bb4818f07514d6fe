"""A small network with everything that strategies treat specially, and its steps on one device."""

import torch
from torch import nn

from lightning_lars import LAMB, LARS, NovoGrad, param_groups

STEPS, RESUMED = 5, 3

CASES = {
    "LARS": (LARS, {"weight_decay": 0.1}),
    "LARS nesterov": (LARS, {"weight_decay": 0.1, "nesterov": True, "trust_clip": 0.3}),
    "LARS clipping": (LARS, {"weight_decay": 0.1, "max_grad_norm": 0.5}),
    "LARS momentum": (LARS, {"weight_decay": 0.1, "denominator": "momentum"}),
    "LARS decayed": (
        LARS,
        {
            "weight_decay": 0.1,
            "denominator": "decayed_gradient",
            "lr_in_momentum": True,
            "trust_clip": "larc",
        },
    ),
    "LAMB": (LAMB, {"weight_decay": 0.1}),
    "NovoGrad": (NovoGrad, {"weight_decay": 0.1}),
    "LAMB clipping": (LAMB, {"weight_decay": 0.1, "max_grad_norm": 0.5, "decoupled_weight_decay": True}),
}
RATES = {LARS: {"lr": 0.2, "trust_coefficient": 0.1}, LAMB: {"lr": 0.05}, NovoGrad: {"lr": 0.02}}


class Block(nn.Module):
    """A residual block of a width that two and four processes cannot share evenly.

    Only what two strategies divide, one after the other, is even: else torch loads no full checkpoint.
    """

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.widen = nn.Linear(5, 8)
        self.narrow = nn.Linear(8, 5)

    def forward(self, x):
        return x + self.narrow(torch.tanh(self.widen(self.norm(x))))


class Net(nn.Module):
    """Blocks, one of which is never used, between two layers with tied weights; one layer is frozen."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(5, 5, bias=False)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.one = Block()
        self.two = Block()
        self.unused = Block()
        self.leave = nn.Linear(5, 5, bias=False)
        self.leave.weight = self.enter.weight
        self.head = nn.Linear(5, 3)
        # Where sequence parallelism divides the activations, and puts them together again.
        self.divide = self.gather = lambda activations: activations

    def forward(self, x):
        h = self.divide(self.frozen(self.enter(x)))
        return self.head(self.leave(self.gather(self.two(self.one(h)))))


def network():
    """The network, the same every time."""
    torch.manual_seed(1)
    return Net()


def batches():
    """Eight samples a step, the same every time."""
    return torch.randn(STEPS, 8, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float32)


def loss_of(outputs):
    """A mean over samples, so that averages over equal shares are the average over all."""
    return (outputs - 1).square().sum(1).mean()


def optimizer_of(case, module):
    """The optimizer of a case over named groups."""
    optimizer_class, options = CASES[case]
    return optimizer_class(param_groups(module), **RATES[optimizer_class], **options)


def trained(case, steps=STEPS):
    """Train on one device; yield parameters and trust ratios after every step."""
    net = network()
    optimizer = optimizer_of(case, net)
    for batch in batches()[:steps]:
        optimizer.zero_grad()
        loss_of(net(batch)).backward()
        optimizer.step()
        yield values(net), floats(optimizer.trust_ratios())


def values(module):
    """Copies of the parameters by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def floats(ratios):
    """The numbers of a dict of tensors."""
    return {name: ratio.item() for name, ratio in ratios.items()}


def deviation(actual, expected):
    """The largest difference of any element of any parameter."""
    assert actual.keys() == expected.keys()
    return max((actual[name] - expected[name]).abs().max().item() for name in expected)
