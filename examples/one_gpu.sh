#!/usr/bin/env bash
# A small model with all its weights on one GPU: Qwen3-0.6B to 1.7B, Qwen2.5-0.5B to 3B, Llama-3.2-1B and 3B on 80 GB.
#
#   MODEL=Qwen3-0.6B-Base DATA=chats.jsonl examples/one_gpu.sh
#   GPU_MEMORY=24 MODEL=Qwen3-0.6B-Base DATA=chats.jsonl examples/one_gpu.sh
#
# Adapters (LoRA) of a larger model, and a PEFT folder of them at the end:
#
#   LORA_RANK=16 MODEL=Qwen3-14B-Base DATA=chats.jsonl examples/one_gpu.sh
#
# The layouts are estimates; none was measured on such a GPU yet.
set -euo pipefail
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-Qwen3-0.6B-Base}
recipe
LORA=()
if [[ -n ${LORA_RANK:-} ]]; then
    LORA=(--lora-rank "$LORA_RANK" --lr 1e-4 --export-adapter "$RUN/adapter")
    layout 1 --lora-rank "$LORA_RANK"
else
    layout 1
fi

launch --standalone --nproc-per-node 1 \
    -m megatron_profit.sft --bf16 "${RECIPE[@]}" "${LAYOUT_FLAGS[@]}" "${LORA[@]}" "$@"
