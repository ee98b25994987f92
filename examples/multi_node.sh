#!/usr/bin/env bash
# Qwen3-14B, 32B or 30B-A3B on two or more nodes of 8 GPUs. The same command on each node, in any order:
#
#   MODEL=Qwen3-32B-Base DATA=chats.jsonl RUN=/shared/run NNODES=2 RDZV_ENDPOINT=node0:29400 examples/multi_node.sh
#
# RDZV_ENDPOINT is the address of one of the nodes and a free port on it. MODEL, DATA and RUN are in folders that all
# nodes see. When a process or a node is lost, torchrun waits for its return and starts all again from the newest
# checkpoint, at most MAX_RESTARTS times; what of this has been seen is in docs/scaling.md.
#
# GPU: 80 GiB. On more nodes the data-parallel size grows; GLOBAL_BATCH has to be a multiple of it.
set -euo pipefail
source "$(dirname "$0")/common.sh"

: "${RDZV_ENDPOINT:?set it to the address of one of the nodes and a port, for instance node0:29400}"
MODEL=${MODEL:-Qwen3-32B-Base}
full_recompute=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
case $(basename "$MODEL") in
*-14B*) layout --tensor-model-parallel-size 4 --sequence-parallel ;;
*-32B*) layout --tensor-model-parallel-size 8 --sequence-parallel "${full_recompute[@]}" ;;
*-30B-A3B*)
    GLOBAL_BATCH=${GLOBAL_BATCH:-16} # a row for each replica on two nodes
    layout --expert-model-parallel-size 8 "${full_recompute[@]}"
    ;;
*)
    : "${LAYOUT:?no layout is known here for $MODEL; set LAYOUT to the flags of one}"
    layout
    ;;
esac
recipe

# Without this, torch 2.15 does not tell a node that joins later where rank 0 is, and a lost node cannot return.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

launch --nnodes "${NNODES:-2}" --nproc-per-node "${GPUS_PER_NODE:-8}" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-profit}" \
    -m megatron_profit.sft --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --dist-ckpt-optim-fully-reshardable --distributed-timeout-minutes 20 \
    "${RECIPE[@]}" "${LAYOUT_FLAGS[@]}" "$@"
