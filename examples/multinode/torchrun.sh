#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Start a run on several machines with torchrun: run this on each machine, with the same HEAD and RUN.
#
#   HEAD=host1 NODES=2 GPUS=8 RUN=my-run examples/multinode/torchrun.sh --config my_config.yaml \
#     --config examples/multinode/hybrid_fsdp.yaml
#
# A process that dies takes its machine's others down, and torchrun starts all of them anew up to RESTARTS times; with
# `--ckpt_path last` they go on from the newest whole checkpoint (the first start warns that there is none, and begins).
#
# Where HEAD is not the name by which the first machine knows itself, say which one it is with NODE_RANK (0, 1, ...), and
# give each machine's own address as LOCAL_ADDR.
set -euo pipefail

HEAD=${HEAD:?the name or address of the first machine}
NODES=${NODES:-2}
GPUS=${GPUS:-8}
PORT=${PORT:-29500}
RUN=${RUN:-lightning-cl}
RESTARTS=${RESTARTS:-3}
# A collective that waits for a dead process ends with an error instead of hanging.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1

where=()
if [ -n "${NODE_RANK:-}" ]; then
  where+=(--rdzv-conf "is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)")
fi
if [ -n "${LOCAL_ADDR:-}" ]; then
  where+=(--local-addr "$LOCAL_ADDR")
fi

exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts "$RESTARTS" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$RUN" ${where[@]+"${where[@]}"} \
  -m lightning_cl fit "$@" --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" --ckpt_path last
