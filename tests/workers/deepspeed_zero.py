"""Takes steps under DeepSpeed on the CPU and prints what came of each stage of ZeRO, as JSON.

Run as ``python -m tests.workers.deepspeed_zero PORT``.
"""

import json
import os
import sys

import torch
from torch import nn

from tests.support.small_network import batches, deviation, loss_of, network, optimizer_of, trained, values

CASE = "LAMB"


def main(port):
    os.environ.update(
        DS_ACCELERATOR="cpu",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
    )
    # Reads the environment.
    import deepspeed

    seen = {}
    for stage in range(4):
        net = network()
        # DeepSpeed wants a gradient of every parameter that it flattens.
        net.unused = nn.Identity()
        config = {
            "train_micro_batch_size_per_gpu": 8,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        }
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer_of(CASE, net), config=config)
        try:
            for batch in batches():
                engine.backward(loss_of(engine(batch)))
                engine.step()
        except RuntimeError as error:
            seen[stage] = str(error)
        else:
            whole, _ = list(trained(CASE))[-1]
            used = {name: p for name, p in whole.items() if not name.startswith("unused")}
            seen[stage] = deviation(values(net), used)
    print(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
