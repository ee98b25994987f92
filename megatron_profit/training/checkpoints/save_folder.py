"""A save folder before a run begins: it holds a run to resume, a run to replace, or none.

A run writes into a folder with checkpoints only if it resumes from them or was told to replace them. Only the
first rank of a run looks.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from checkpoint_conversion.torch_dist.writer import RELEASE, TRACKER
from megatron_profit.megatron_patches.loggers import has_curves
from megatron_profit.training.checkpoints.folder import (
    MARKER,
    CheckpointError,
    backups_in,
    read_json,
    remove_checkpoint,
    same_folder,
    saved_in,
)
from megatron_profit.training.monitoring.metrics_file import SUPERSEDED
from megatron_profit.training.process.console import warn_rank_0
from megatron_profit.training.process.launcher import job_id

# Key of a checkpoint's marker: torchrun's id of the job that wrote it.
JOB = "torchrun_id"
METRICS = "metrics.jsonl"
WANDB_RUN = "wandb_run.json"
# Files of a run besides its checkpoints; the last two are Megatron's, for W&B and --log-progress.
_FILES = (
    TRACKER,
    METRICS,
    METRICS + SUPERSEDED,
    WANDB_RUN,
    "latest_wandb_artifact_path.txt",
    "progress.txt",
)


def check_save_folder(
    save: Path, load: Path | None, *, overwrite: bool, start: Path | None = None
) -> None:
    """Refuse to write into a folder with checkpoints that the run neither resumes nor may replace.

    Files of a run that died before its first checkpoint was complete do not count.

    Args:
        save: The folder; it need not exist.
        load: The folder that the run resumes from, if any.
        overwrite: Whether the run may replace the one in the folder.
        start: The checkpoints that a new run starts from, if any.

    Raises:
        CheckpointError: Names the folder, the checkpoints in it and the flags that help.
    """
    if same_folder(load, save):
        if overwrite:
            raise CheckpointError(
                f"--load {load} goes on with the run in that folder, and --overwrite replaces it; drop one "
                "of the two"
            )
        return
    held = checkpoints_in(save)
    if not held:
        return
    if overwrite and same_folder(start, save):
        raise CheckpointError(
            "--overwrite would remove the checkpoint that the run starts from (--pretrained-checkpoint "
            f"{start}); name another --save folder"
        )
    if not overwrite:
        raise CheckpointError(
            f"--save {save} holds a run already ({names_of(held)}); to go on with it, give --load {save}; to "
            "replace it, give --overwrite; or name another folder"
        )
    _refuse_restart(save, held)
    own = _own(save)
    foreign = [folder for folder in held if folder not in own]
    if foreign:
        raise CheckpointError(
            f"--save {save} holds checkpoints that this entry has not written ({names_of(foreign)}), and "
            "--overwrite removes only its own; remove them yourself, or name another folder"
        )


def _refuse_restart(save: Path, held: list[Path]) -> None:
    """Refuse to overwrite what an earlier start of the same job by torchrun has written."""
    remedy = f"does not repeat --overwrite; to go on with them, give --load {save} in place of it"
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        raise CheckpointError(
            f"--save {save} holds checkpoints ({names_of(held)}), and this is a restart by torchrun, which "
            f"{remedy}"
        )
    job = job_id()
    same = [folder for folder in held if job is not None and _job_of(folder) == job]
    if same:
        raise CheckpointError(
            f"--save {save} holds checkpoints ({names_of(same)}) with the --rdzv-id of this job, {job}, so "
            f"this is a restart, which {remedy}; to replace them with a new job, give another --rdzv-id"
        )


def _job_of(folder: Path) -> Any:
    """Return torchrun's id of the job that wrote a checkpoint; None where it is unknown."""
    with contextlib.suppress(CheckpointError):
        return read_json(folder / MARKER).get(JOB)
    return None


def tell_of_other_curves(folder: str) -> None:
    """Warn where a new run writes its curves into a folder that has some."""
    if has_curves(folder):
        warn_rank_0(
            f"--tensorboard-dir {folder} has the curves of another run, or of one that died; "
            "TensorBoard shows this one in their place"
        )


def clear_save_folder(save: Path) -> list[Path]:
    """Remove the run that a folder holds: checkpoints of this entry, tracker file, metrics.

    Links, checkpoints of other programs and all other files stay.

    Returns:
        The removed files and folders.

    Raises:
        OSError: A file cannot be removed.
    """
    removed = [save / name for name in _FILES if (save / name).is_file()]
    for file in removed:
        file.unlink()
    for folder in (*_own(save), *backups_in(save)):
        remove_checkpoint(folder)
        removed.append(folder)
    return removed


def checkpoints_in(save: Path) -> list[Path]:
    """Return the folders that hold or held a checkpoint, newest first.

    Folders whose save never ended are left out.
    """
    if not save.is_dir():
        return []
    folders = [saved.folder for saved in saved_in(save)]
    return [folder for folder in (*folders, save / RELEASE) if _is_checkpoint(folder)]


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a save came to its end here; `.metadata` is written last."""
    return (folder / ".metadata").is_file() or any(folder.glob("mp_rank_*"))


def _own(save: Path) -> list[Path]:
    return [saved.folder for saved in saved_in(save) if saved.is_own]


def names_of(paths: list[Path]) -> str:
    """Return the names of files or folders; of many, the middle ones are left out."""
    names = [path.name for path in paths]
    return ", ".join(names if len(names) <= 3 else [*names[:2], "...", names[-1]])
