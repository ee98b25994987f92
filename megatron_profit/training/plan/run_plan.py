"""The plan of a run, made once: the settings of its flags, and everything that it needs opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from checkpoint_conversion.families import family_for
from checkpoint_conversion.hf.carried import Notes, carried_in, description, notes_at_start
from checkpoint_conversion.model_card.hub import check_upload
from checkpoint_conversion.torch_dist.folder import find_checkpoint
from megatron_profit.data.flags import LIST_FLAGS
from megatron_profit.evaluation.after_training import check_task_files
from megatron_profit.flags import second_lists
from megatron_profit.training.arguments.derive import RunSettings, derive
from megatron_profit.training.arguments.disk import RunFiles, open_files
from megatron_profit.training.checkpoints.choose import (
    CheckpointFlags,
    Resumed,
    choose_checkpoints,
)
from megatron_profit.training.checkpoints.keep_options import misleading_metric
from megatron_profit.training.checkpoints.run_record import RunRecord
from megatron_profit.training.checkpoints.save_folder import tell_of_other_curves
from megatron_profit.training.checkpoints.save_lock import hold_new
from megatron_profit.training.checkpoints.size import check_space_at_start
from megatron_profit.training.plan.compare import check_length, check_resume
from megatron_profit.training.plan.datasets import SFTData, build_datasets
from megatron_profit.training.plan.same_flags import check_same_data, check_same_flags
from megatron_profit.training.plan.this_run import describe_run
from megatron_profit.training.plan.wandb_run import resume_wandb_run
from megatron_profit.training.process.console import print_rank_0, warn_rank_0
from megatron_profit.training.process.ranks import is_first_rank, world_size

_NOTHING_CARRIED: Notes = MappingProxyType({})


@dataclass(frozen=True)
class RunPlan:
    """A run that is ready to start.

    Attributes:
        settings: Everything that follows from the flags, config.json and the number of rows.
        files: The folders and files that the flags name.
        data: The rows.
        record: The record that each checkpoint of the run holds; empty off the first rank.
        carried: The notes of each checkpoint on tensors of the model's folder that are not trained; empty
            off the first rank.
        repository: The repository of the hub that gets the export; None without one, and off the first rank.
    """

    settings: RunSettings
    files: RunFiles
    data: SFTData
    record: RunRecord
    carried: Notes = _NOTHING_CARRIED
    repository: str | None = None


def plan_run(argv: Sequence[str], device: str) -> RunPlan:
    """Plan a run on this rank. All ranks of the run call this.

    Args:
        argv: The flags of `megatron_profit.sft`, without the program's name.
        device: "cuda" or "cpu", as `megatron_profit.megatron_patches.activate` chose it.

    Raises:
        ArgumentsError: The flags cannot be used. No file but config.json has been opened.
        CheckpointError, ConversionError, DataError: A checkpoint, a model or the data cannot be used.
    """
    for option in second_lists(argv, LIST_FLAGS):
        warn_rank_0(f"{option} is given more than once; the last one counts")
    settings = derive(argv, device, world_size())
    check_same_flags(settings.given, device)
    return open_run(settings)


def open_run(settings: RunSettings) -> RunPlan:
    """Choose the checkpoint, prepare the data, open the models and hold the folder of checkpoints.

    Raises:
        ArgumentsError, CheckpointError, ConversionError, DataError: As `plan_run`.
    """
    flags = CheckpointFlags.of(settings.values)
    if is_first_rank():
        check_task_files(settings.eval_tasks)
    if hint := misleading_metric(settings.keep, settings.objective):
        warn_rank_0(hint)
    resumed = choose_checkpoints(flags, settings.check_checkpoint)
    files = open_files(settings)
    data = build_datasets(settings, files.data)
    check_same_data(data.contents)
    settings = settings.with_rows(data.train.labelled_rows, data.valid_rows, resumed)
    files = files.with_turn_end(settings, data.turn_end, print_rank_0)
    record, carried = RunRecord(), _NOTHING_CARRIED
    if is_first_rank():
        record = describe_run(settings, files, data)
        _check_record(record, settings, data, resumed)
        start = _start(flags, resumed)
        carried = _note_carried(settings, start)
        files = files.with_carried(carried, start)
    if settings.save is not None:
        hold_new(settings.save)
    resume_wandb_run(settings.values, resumed)
    return RunPlan(settings, files, data, record, carried, _repository(settings))


def _start(flags: CheckpointFlags, resumed: Resumed | None) -> Path | None:
    """Return the folder of the checkpoint that the run starts from; None without one."""
    start = flags.load if flags.finetune else flags.start
    if resumed is not None:
        start = resumed.folder
    return None if start is None else find_checkpoint(start)


def _note_carried(settings: RunSettings, start: Path | None) -> Notes:
    """Return the notes on the tensors of the model's folder that are not trained, and tell of them.

    Raises:
        ConversionError: One is missing or has changed since the checkpoint that the run starts from.
    """
    tensors = carried_in(settings.hf_model, family_for(settings.config))
    if tensors:
        print_rank_0(f"> {description(tensors)}")
    return notes_at_start(settings.hf_model, tensors, start)


def _repository(settings: RunSettings) -> str | None:
    """Return the repository that gets the export, which is there and can be written to."""
    asked = settings.publication
    if asked.push_to_hub is None or not is_first_rank():
        return None
    repository = check_upload(asked.push_to_hub, public=asked.push_public)
    print_rank_0(f"> the export will be uploaded to {repository}")
    return repository


def _check_record(
    record: RunRecord, settings: RunSettings, data: SFTData, resumed: Resumed | None
) -> None:
    """Check the record of the run against the checkpoint to resume, and the space on the disk.

    Raises:
        CheckpointError: The record does not fit the checkpoint, or there is too little space to save.
    """
    curves = settings.values["tensorboard_dir"]
    is_finished = resumed is not None and resumed.iteration == settings.steps
    if resumed is not None:
        check_length(resumed, settings, print_rank_0)
        rows_until = data.train.order.rows_until
        check_resume(*(resumed, record, settings.namespace, rows_until, print_rank_0), is_finished)
    elif curves:
        tell_of_other_curves(curves)
    if settings.save is not None and not is_finished:
        check_space_at_start(settings.save, settings.hf_model, settings.values, settings.lora)
