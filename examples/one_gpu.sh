#!/usr/bin/env bash
# Qwen3-0.6B with all its weights on one GPU.
#
#   MODEL=Qwen3-0.6B-Base DATA=chats.jsonl examples/one_gpu.sh
#
# GPU: 32 GiB. With `LAYOUT="--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"` 24 GiB.
set -euo pipefail
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-Qwen3-0.6B-Base}
recipe
layout --tensor-model-parallel-size 1

launch --standalone --nproc-per-node 1 \
    -m megatron_profit.sft --bf16 "${RECIPE[@]}" "${LAYOUT_FLAGS[@]}" "$@"
