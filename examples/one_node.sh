#!/usr/bin/env bash
# A model on one node of 8 GPUs: up to Qwen3-14B, Qwen3-30B-A3B, Qwen2.5-14B or Llama-3.1-8B on GPUs of 80 GB.
#
#   MODEL=Qwen3-14B-Base DATA=chats.jsonl examples/one_node.sh
#   MODEL=Llama-3.1-8B GPU_MEMORY=140 DATA=chats.jsonl examples/one_node.sh
#
# What each process prints is in RUN/logs, too. A model that does not fit is refused, with the number of GPUs that it needs.
set -euo pipefail
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-Qwen3-14B-Base}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
recipe
layout "$GPUS_PER_NODE"

launch --standalone --nproc-per-node "$GPUS_PER_NODE" --log-dir "$RUN/logs" --tee 3 \
    -m megatron_profit.sft --bf16 "${RECIPE[@]}" "${LAYOUT_FLAGS[@]}" "$@"
