"""LARS in a plain PyTorch training loop, without Lightning.

python examples/plain_torch.py
"""

import torch
from torch import nn

from lightning_lars import LARS, build_optimizer

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 1))
inputs = torch.randn(1024, 20)
targets = inputs.pow(2).sum(1, keepdim=True) / 20

# Norms and biases are trained by plain SGD, for which LARS's learning rate is too high.
optimizer = build_optimizer(model, LARS, lr=5.0, weight_decay=1e-4, excluded_lr_scale=0.01)
for step in range(101):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        ratios = {name: f"{ratio:.1e}" for name, ratio in optimizer.trust_ratios().items()}
        print(f"step {step:3}  loss {loss:.4f}  trust ratios {ratios}")
