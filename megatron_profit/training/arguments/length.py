"""The length of a run in steps, and the schedules that must end within it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_profit.flags import ArgumentsError
from megatron_profit.objectives import Objective
from megatron_profit.training.step.objective_flags import check_steps


def scheduler_of_flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """Let the flags decide the learning rate's schedule after a resume too.

    The checkpoint's schedule is used only if a flag names it.
    """
    checkpoint, flags = "use_checkpoint_opt_param_scheduler", "override_opt_param_scheduler"
    if given.get(checkpoint) and given.get(flags):
        raise ArgumentsError(
            "--use-checkpoint-opt_param-scheduler and --override-opt_param-scheduler contradict each other; "
            "drop one"
        )
    return {} if given.get(checkpoint) else {flags: True}


def steps_of_flags(settings: Mapping[str, Any], batch_size: int) -> int | None:
    """Return the steps of the run if flags alone give them.

    The result is None with epochs, and where the batch size changes. For example, 1,000 samples with a batch
    size of 32 are 31 steps.
    """
    if settings["train_samples"] is None:
        return settings["train_iters"]
    return None if batch_size_changes(settings) else settings["train_samples"] // batch_size


def batch_size_changes(settings: Mapping[str, Any]) -> bool:
    """Return whether the batch size changes during the run, so that Megatron itself counts rows."""
    return bool(settings["step_batch_size_schedule"])


def check_run_steps(settings: Mapping[str, Any], objective: Objective, steps: int) -> None:
    """Refuse a run without a step, or whose warm-up leaves no step for the decay of the learning rate.

    Raises:
        ArgumentsError: Names the flag, its value and the limit.
    """
    if steps < 1:
        raise ArgumentsError(
            f"--train-samples {settings['train_samples']} is less than a global batch; there is no step"
        )
    unit = "iters" if settings["train_samples"] is None else "samples"
    length = settings["train_samples"] or steps
    warmup, decay = settings[f"lr_warmup_{unit}"], settings[f"lr_decay_{unit}"] or length
    if warmup >= decay:
        raise ArgumentsError(
            f"--lr-warmup-{unit} {warmup} leaves none of the {decay} {unit} for the decay of the learning "
            f"rate; give fewer than {decay}"
        )
    check_steps(objective, steps)


def batch_schedule(text: str, seq_length: int) -> list[tuple[int, int]]:
    """Return the sizes of a --step-batch-size-schedule as Megatron reads them, each after its first row."""
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    return StepBatchsizeNumMicroBatchesCalculator(
        micro_batch_size=1,
        data_parallel_size=1,
        decrease_batch_size_if_needed=False,
        rank=1,  # only rank 0 prints it
        schedule=text,
        seq_length=seq_length,
    ).schedule


def check_batch_sizes(settings: Mapping[str, Any], divisor: int, rows: int) -> None:
    """Refuse a schedule of batch sizes that Megatron cannot read, or whose steps the ranks cannot share.

    Megatron compares a batch size with the layout when it is reached. Sizes that the run has left are not
    compared: a run may go on with more processes.

    Args:
        settings: The arguments of the run, with a `step_batch_size_schedule`.
        divisor: Rows of a micro-batch over all data-parallel ranks.
        rows: Rows that the run has taken.

    Raises:
        ArgumentsError: Names the entry, the divisor and sizes near it.
    """
    text = settings["step_batch_size_schedule"]
    try:
        schedule = batch_schedule(text, settings["seq_length"])
    except (ValueError, AssertionError, IndexError) as error:
        raise ArgumentsError(
            f"--step-batch-size-schedule {text!r} cannot be read: {error}; give tokens and rows from which "
            'they hold, as "0:32 1M:64"'
        ) from error
    ends = [start for start, _ in schedule[1:]] + [math.inf]
    for (start, size), end in zip(schedule, ends, strict=True):
        if end > rows and size % divisor:
            near = sorted({max(size - size % divisor, divisor), size - size % divisor + divisor})
            raise ArgumentsError(
                f"--step-batch-size-schedule {text!r} has steps of {size} rows from row {start} on, and "
                f"--micro-batch-size x data-parallel size {divisor} does not divide {size}; give "
                f"{' or '.join(map(str, near))}"
            )
