# shellcheck shell=bash disable=SC2034 # the arrays are for the scripts that source this
# What the launch scripts here share; they source this file. Objective and optimizer follow the ProFit paper
# (docs/objectives.md); a script adds model, layout and machines. By environment variables:
#
#   MODEL           HuggingFace folder to start from         DATA   chat files, separated by spaces
#   RUN             folder of the run, seen by all nodes     TAU    keep tokens of a probability above it
#   GPU_MEMORY      GiB of a GPU                             SEQ_LENGTH, SAVE_INTERVAL
#   GLOBAL_BATCH    rows of a step                           EPOCHS how often all is trained; or TRAIN_ITERS steps
#   LAYOUT          flags in place of the layout that `megatron-profit layout` chooses for MODEL and these GPUs
#
# Records share rows of SEQ_LENGTH tokens, and GLOBAL_BATCH counts rows. The paper trains 32 records in a step: with 840
# tokens each they are 3.3 rows of 8,192, hence 4. The run says at its start what a step of your records holds, how
# large a checkpoint is and how long writing it takes. The two newest checkpoints stay.
#
# and by flags: whatever follows a script's name is passed to the training, and wins over what is said here. The layout
# is chosen without these flags: rows, their length and a layout of your own are the variables above.
# The same command again resumes from the newest checkpoint in RUN.

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# The variables that `megatron-profit sft` sets: less unused memory, NCCL's warnings, seconds for the last checkpoint
# when a scheduler ends the run (torch 2.10 waits 30), and the return of a lost node.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}

# recipe: fill the array RECIPE with everything but the layout.
recipe() {
    local -a data length=(--epochs "${EPOCHS:-1}")
    if [[ -n ${TRAIN_ITERS:-} ]]; then length=(--train-iters "$TRAIN_ITERS"); fi
    RUN=${RUN:-runs/$(basename "$MODEL")-profit${LORA_RANK:+-lora}}
    read -r -a data <<<"${DATA:-chats.jsonl}"
    RECIPE=(
        --hf-model "$MODEL" --export-hf "$RUN/hf"
        --data "${data[@]}" "${length[@]}" --seq-length "${SEQ_LENGTH:-8192}"
        --objective profit --prob-threshold "${TAU:-0.1}" --threshold-direction higher
        --lr 1e-5 --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.1
        --clip-grad 1.0 --weight-decay 0
        --load "$RUN/checkpoints" --save "$RUN/checkpoints" --save-interval "${SAVE_INTERVAL:-20}" --keep-last 2
        --tensorboard-dir "$RUN/tensorboard"
    )
}

# layout GPUS [FLAG...]: fill the array LAYOUT_FLAGS with the layout of the variable LAYOUT, or else with the fastest one
# that fits by the estimates, given the model, the GPUs and these flags of the training.
layout() {
    local flags
    local -a wish=(--hf-model "$MODEL" --gpus "$1" --gpu-memory "${GPU_MEMORY:-79.6}" --seq-length "${SEQ_LENGTH:-8192}")
    if [[ -n ${LAYOUT:-} ]]; then
        read -r -a LAYOUT_FLAGS <<<"--micro-batch-size 1 --global-batch-size ${GLOBAL_BATCH:-4} $LAYOUT"
        return
    fi
    if [[ -n ${GLOBAL_BATCH:-} ]]; then wish+=(--global-batch-size "$GLOBAL_BATCH"); fi
    flags=$(megatron-profit layout "${wish[@]}" --gpus-per-node "${GPUS_PER_NODE:-8}" "${@:2}")
    read -r -a LAYOUT_FLAGS <<<"$flags"
}

# launch ARGUMENT...: become torchrun, which hands the signals of schedulers to the training. That writes a checkpoint
# and ends. (torch 2.10 and later know all flags.)
launch() {
    exec torchrun --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1 "$@"
}
