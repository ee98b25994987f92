#!/usr/bin/env bash
# Qwen3-4B or Qwen3-14B on one node of 8 GPUs.
#
#   MODEL=Qwen3-14B-Base DATA=chats.jsonl examples/one_node.sh
#
# GPU: 80 GiB. Other models: give a layout, which `megatron-profit estimate --help` helps to find.
set -euo pipefail
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-Qwen3-14B-Base}
case $(basename "$MODEL") in
*-4B*)
    GLOBAL_BATCH=${GLOBAL_BATCH:-8} # a row for each replica
    layout --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    ;;
*-14B*)
    layout --tensor-model-parallel-size 4 --sequence-parallel \
        --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    ;;
*)
    : "${LAYOUT:?no layout is known here for $MODEL; set LAYOUT to the flags of one}"
    layout
    ;;
esac
recipe

launch --standalone --nproc-per-node "${GPUS_PER_NODE:-8}" \
    -m megatron_profit.sft --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    "${RECIPE[@]}" "${LAYOUT_FLAGS[@]}" "$@"
