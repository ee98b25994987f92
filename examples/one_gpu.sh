#!/usr/bin/env bash
# Qwen3-0.6B with all its weights on one GPU.
#
#   MODEL=Qwen3-0.6B-Base DATA=chats.jsonl examples/one_gpu.sh
#
# Adapters (LoRA) of a larger model, and a PEFT folder of them at the end:
#
#   LORA_RANK=16 MODEL=Qwen3-14B-Base DATA=chats.jsonl examples/one_gpu.sh
#
# This fits a GPU of 80 GB: 42 GiB by `megatron-profit estimate`; it was not measured yet.
#
# GPU: 32 GiB. With `LAYOUT="--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"` 24 GiB.
set -euo pipefail
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-Qwen3-0.6B-Base}
recipe
LORA=()
FULL="--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
if [[ -n ${LORA_RANK:-} ]]; then
    LORA=(--lora-rank "$LORA_RANK" --lr 1e-4 --export-adapter "$RUN/adapter")
    LAYOUT=${LAYOUT:-$FULL}
fi
layout --tensor-model-parallel-size 1

launch --standalone --nproc-per-node 1 \
    -m megatron_profit.sft --bf16 "${RECIPE[@]}" "${LAYOUT_FLAGS[@]}" "${LORA[@]}" "$@"
