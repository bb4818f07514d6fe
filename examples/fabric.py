"""LARS in a loop of Lightning Fabric, with warmup, and rates that follow the effective batch size.

    python examples/fabric.py
    python examples/fabric.py --devices 2 --accumulate 2

Trains a small CNN on scikit-learn's handwritten digits, and resumes from its own checkpoint halfway through.
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from images import batches, digits, network
from lightning.fabric import Fabric
from torch.nn import functional

from lightning_lars import LARS, WarmupDecayLR, build_optimizer
from lightning_lars.learning_rate import scaling_factor

TUNED_AT = 128  # the batch size of the learning rate and the weight decay below


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu", help="as for lightning.Fabric")
    parser.add_argument("--batch-size", type=int, default=64, help="per device")
    parser.add_argument("--accumulate", type=int, default=2, help="batches per optimizer step")
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()

    fabric = Fabric(accelerator=arguments.accelerator, devices=arguments.devices)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    train, test = digits()
    loader = fabric.setup_dataloaders(batches(train, arguments.batch_size, shuffle=True))
    steps = arguments.epochs * (len(loader) // arguments.accumulate)

    effective_batch_size = arguments.batch_size * fabric.world_size * arguments.accumulate
    scale = scaling_factor(effective_batch_size, TUNED_AT, "sqrt")
    model = network(image_size=8)
    optimizer = build_optimizer(
        model, LARS, lr=6.0 * scale, weight_decay=2.5e-4 * scale, trust_clip=0.02, excluded_lr=0.05
    )
    scheduler = WarmupDecayLR(optimizer, warmup_steps=math.ceil(steps / 10), total_steps=steps)
    model, optimizer = fabric.setup(model, optimizer)

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    for epoch in range(arguments.epochs):
        if epoch == arguments.epochs // 2:
            with tempfile.TemporaryDirectory() as folder:
                path = fabric.broadcast(Path(folder)) / "checkpoint.ckpt"
                fabric.save(path, state)
                fabric.load(path, state)
                fabric.barrier()
        for number, (images, labels) in enumerate(loader, start=1):
            is_last = number % arguments.accumulate == 0
            with fabric.no_backward_sync(model, enabled=not is_last):
                loss = functional.cross_entropy(model(images), labels)
                fabric.backward(loss / arguments.accumulate)
            if is_last:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        if fabric.is_global_zero:
            ratios = torch.stack(list(optimizer.trust_ratios().values()))
            print(
                f"epoch {epoch}: loss {loss:.3f}, lr {scheduler.get_last_lr()[0]:.3g}, "
                f"trust ratios {ratios.min():.1e} to {ratios.max():.1e}"
            )

    model.eval()
    images, labels = (tensor.to(fabric.device) for tensor in test.tensors)
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean()
    if fabric.is_global_zero:
        print(f"Test accuracy: {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main()
