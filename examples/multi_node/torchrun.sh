#!/bin/sh
# Trains on several hosts. Run the same command on each of them, and again on one that has died:
#
#     HEAD=host0 NODES=2 DEVICES=8 sh examples/multi_node/torchrun.sh --strategy ddp --checkpoint-dir /shared/run1
#
# HEAD is the name of the host where the others find each other, NODES the number of hosts, DEVICES that of
# devices on each. The arguments are those of examples/train.py.
#
: "${HEAD:?must be the name of a host}" "${NODES:?must be the number of hosts}"
: "${DEVICES:?must be the number of devices on each host}"
# A store that several rounds of meeting share would not tell a host that comes back where the others are.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
    --nnodes "$NODES" --nproc-per-node "$DEVICES" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29400}" --rdzv-id "${RUN:-train}" \
    "$(dirname "$0")/../train.py" --num-nodes "$NODES" --devices "$DEVICES" "$@"
