#!/usr/bin/env bash
# A model on two or more nodes of 8 GPUs: Qwen3-32B on 2 nodes of 80 GB, Qwen2.5-72B or Llama-3.1-70B on 4,
# Qwen3-235B-A22B on 8. The same command on each node, in any order:
#
#   MODEL=Qwen3-32B DATA=chats.jsonl RUN=/shared/run NNODES=2 RDZV_ENDPOINT=node0:29400 examples/multi_node.sh
#
# RDZV_ENDPOINT is the address of the node whose name sorts first as text (node10 comes before node9), and a free port
# on it: torchrun puts rank 0 there, and an evaluation or upload after the training needs the rendezvous until its end.
# MODEL, DATA and RUN are in folders that all nodes see. When a process or a node is lost, torchrun waits for its return
# and starts all again from the newest checkpoint, at most MAX_RESTARTS times; what of this has been seen is in
# docs/scaling.md. What each process prints is in RUN/logs/HOST, too.
set -euo pipefail
source "$(dirname "$0")/common.sh"

: "${RDZV_ENDPOINT:?set it to the address of the node whose name sorts first and a port, for instance node0:29400}"
MODEL=${MODEL:-Qwen3-32B}
NNODES=${NNODES:-2}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
recipe
layout $((${NNODES%%:*} * GPUS_PER_NODE))

launch --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-profit}" \
    --log-dir "$RUN/logs/$(hostname)" --tee 3 \
    -m megatron_profit.sft --bf16 --distributed-timeout-minutes 20 "${RECIPE[@]}" "${LAYOUT_FLAGS[@]}" "$@"
