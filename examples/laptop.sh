#!/usr/bin/env bash
# The cluster's program on a laptop without a GPU: two CPU processes with tensor parallelism, in about a minute.
#
#   TRAIN_ITERS=20 examples/laptop.sh
#
# Without MODEL and DATA it makes a tiny Qwen3 with random weights and trains sums in words. No token of such a
# model is probable, so TAU is low here. What Megatron prints is in RUN/checkpoints/megatron.log.
# `make quickstart` shows the whole job, from a base that has learnt something.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/common.sh

DATA=${DATA:-examples/data/arithmetic_chatty.jsonl}
SEQ_LENGTH=${SEQ_LENGTH:-256}
TAU=${TAU:-0.001}
RUN=${RUN:-runs/laptop}
OMP_NUM_THREADS=${LAPTOP_THREADS:-1}
if [[ -z ${MODEL:-} ]]; then
    MODEL=$RUN/tiny
    [[ -d $MODEL ]] || python tools/make_tiny_model.py --out "$MODEL" --data examples/data/arithmetic_*.jsonl
fi
LAYOUT=${LAYOUT:---tensor-model-parallel-size 2 --sequence-parallel}
recipe
layout 2

launch --standalone --nproc-per-node 2 \
    -m megatron_profit.sft --device cpu --quiet "${RECIPE[@]}" "${LAYOUT_FLAGS[@]}" "$@"
