# shellcheck shell=bash disable=SC2034 # the arrays are for the scripts that source this
# What the launch scripts here share; they source this file. Objective and optimizer follow the ProFit paper
# (docs/objectives.md); a script adds model, layout and machines. By environment variables:
#
#   MODEL           HuggingFace folder to start from         DATA   chat files, separated by spaces
#   RUN             folder of the run, seen by all nodes     TAU    keep tokens of a probability above it
#   LAYOUT          flags in place of the script's layout    SEQ_LENGTH, GLOBAL_BATCH, SAVE_INTERVAL
#   EPOCHS          how often all is trained; or TRAIN_ITERS steps
#
# Records share rows of SEQ_LENGTH tokens, and GLOBAL_BATCH counts rows. The paper trains 32 records in a step: with 840
# tokens each they are 3.3 rows of 8,192, hence 4. The run says at its start what a step of your records holds.
#
# and by flags: whatever follows a script's name is passed to the training, and wins over what is said here.
# The same command again resumes from the newest checkpoint in RUN.

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# recipe: fill the array RECIPE with everything but the layout.
recipe() {
    local -a data length=(--epochs "${EPOCHS:-1}")
    if [[ -n ${TRAIN_ITERS:-} ]]; then length=(--train-iters "$TRAIN_ITERS"); fi
    RUN=${RUN:-runs/$(basename "$MODEL")-profit}
    read -r -a data <<<"${DATA:-chats.jsonl}"
    RECIPE=(
        --hf-model "$MODEL" --export-hf "$RUN/hf"
        --data "${data[@]}" "${length[@]}" --seq-length "${SEQ_LENGTH:-8192}"
        --objective profit --prob-threshold "${TAU:-0.1}" --threshold-direction higher
        --micro-batch-size 1 --global-batch-size "${GLOBAL_BATCH:-4}"
        --lr 1e-5 --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.1
        --clip-grad 1.0 --weight-decay 0
        --load "$RUN/checkpoints" --save "$RUN/checkpoints" --save-interval "${SAVE_INTERVAL:-20}"
        --tensorboard-dir "$RUN/tensorboard"
    )
}

# layout FLAG...: fill the array LAYOUT_FLAGS with these flags, or with those of the variable LAYOUT.
layout() {
    LAYOUT_FLAGS=("$@")
    if [[ -n ${LAYOUT:-} ]]; then read -r -a LAYOUT_FLAGS <<<"$LAYOUT"; fi
}

# launch ARGUMENT...: become torchrun, which hands the signals of schedulers to the training. That writes a checkpoint
# and ends; large ones need more than the 30 seconds that torchrun would wait. (The flags are those of torch 2.15.)
launch() {
    exec torchrun --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1 --shutdown-timeout "${STOP_SECONDS:-300}" "$@"
}
