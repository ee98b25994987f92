"""The decision on the checkpoint that a run starts from: one for all ranks, before the run begins.

The first rank finds the newest whole checkpoint and, if need be, mends Megatron's tracker file (`folder.py`).
The others help it to compare checksums (`shared_check.py`). Then they wait until they see the same file, over
a network file system as well. From then on Megatron reads the checkpoint that all agree on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_conversion.torch_dist.saved_arguments import SavedRun, read_saved_run
from megatron_profit.training.checkpoints.folder import (
    CheckpointError,
    Inspect,
    check_named,
    folder_of,
    holds_checkpoint,
    problem_of,
    read_tracker,
    same_folder,
    settle,
)
from megatron_profit.training.checkpoints.save_folder import check_save_folder
from megatron_profit.training.checkpoints.save_lock import hold
from megatron_profit.training.checkpoints.shared_check import shared_check
from megatron_profit.training.process.console import warn_rank_0
from megatron_profit.training.process.ranks import (
    is_first_rank,
    is_seen_in_time,
    shared_store,
    world_size,
)


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run resumes.

    Attributes:
        folder: Folder of the checkpoint.
        iteration: Steps that it has made.
        saved: Megatron's arguments in it, by name; empty where it keeps none.
    """

    folder: Path
    iteration: int
    saved: Mapping[str, Any]

    @property
    def done(self) -> tuple[int, int]:
        """Steps and the rows that they took; zeros where the checkpoint does not say."""
        rows = self.saved.get("consumed_train_samples")
        return (self.iteration, rows) if type(rows) is int else (0, 0)


@dataclass(frozen=True)
class CheckpointFlags:
    """The flags that name checkpoints.

    Attributes:
        load, save, start: The folders of --load, --save and --pretrained-checkpoint.
        step: The checkpoint in `load` that is read; None for the newest.
        finetune: Whether only the weights of `load` are taken.
        overwrite: Whether the run may take the place of the one in `save`.
        skip_checksums: Whether checkpoints are read without comparing their checksums first.
    """

    load: Path | None
    save: Path | None
    start: Path | None
    step: int | None
    finetune: bool
    overwrite: bool
    skip_checksums: bool

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> CheckpointFlags:
        """Return the flags among all arguments, given by name."""

        def folder(name: str) -> Path | None:
            return Path(values[name]) if values[name] else None

        return cls(
            load=folder("load"),
            save=folder("save"),
            start=folder("pretrained_checkpoint"),
            step=values["ckpt_step"],
            finetune=values["finetune"],
            overwrite=values["overwrite"],
            skip_checksums=values["skip_checksums"],
        )


def choose_checkpoints(flags: CheckpointFlags, check: Callable[[SavedRun], None]) -> Resumed | None:
    """Make the tracker file in `--load` name a whole checkpoint on all ranks: its own, else the newest one.

    If there is a folder `--save` and the run may write there, the first rank holds it from then on.

    Args:
        flags: The flags of the run.
        check: Refuses a checkpoint of another model.

    Returns:
        The checkpoint of the run that is resumed; None for a new run, whatever weights it starts with.

    Raises:
        CheckpointError: A checkpoint that was asked for is not whole, or there are checkpoints and none is
            whole. Or the ranks do not see the same folder. Or another run saves there, or has saved there.
    """
    if flags.save is not None:
        _claim(flags)
    if flags.load is None and flags.start is None:
        return None
    with shared_check(shared_store, skip=flags.skip_checksums) as inspect:
        if inspect is not None:
            decided = _decide(flags, inspect)
    if flags.load is not None:
        if is_first_rank():
            _publish(decided)
        else:
            decided = _wait_for(flags.load)
        if named := str(flags.step or decided):
            return _resumed(flags, named, check)
    if flags.start is not None and holds_checkpoint(flags.start):
        check(read_saved_run(flags.start))
    return None


def _resumed(
    flags: CheckpointFlags, named: str, check: Callable[[SavedRun], None]
) -> Resumed | None:
    """Read the checkpoint in `--load`; return it if the run goes on from it."""
    assert flags.load is not None
    saved = read_saved_run(flags.load, named)
    if flags.finetune or not named.isdigit():
        check(saved)
        return None
    folder, iteration = folder_of(flags.load, int(named)), int(named)
    _check_iteration(folder, iteration, saved.iteration)
    check(saved)
    return Resumed(folder, iteration, saved.arguments)


def _check_iteration(folder: Path, iteration: int, saved: Any) -> None:
    """Refuse a checkpoint in the folder of another iteration: Megatron would continue from its own number."""
    if saved in (None, iteration):
        return
    remedy = f"; rename the folder to {folder_of(Path(), saved)}" if type(saved) is int else ""
    raise CheckpointError(f"{folder} holds the checkpoint of iteration {saved!r}{remedy}")


def _claim(flags: CheckpointFlags) -> None:
    """Check that the run may write into its folder, and hold it if it exists. The first rank calls this."""
    if not is_first_rank():
        return
    assert flags.save is not None
    check = functools.partial(
        check_save_folder,
        flags.save,
        flags.load,
        overwrite=flags.overwrite,
        start=flags.start,
    )
    try:
        check()
        if flags.save.is_dir() and hold(flags.save):
            # Another run may have left the folder just now.
            check()
    except (OSError, RuntimeError) as error:  # links in a circle are a RuntimeError
        raise CheckpointError(f"--save {flags.save} cannot be used: {error}") from error


def _decide(flags: CheckpointFlags, inspect: Inspect) -> str:
    """Check, on the first rank, the checkpoint that the run may start from.

    Returns:
        The content of the tracker file in `--load`; "" where there is no checkpoint.
    """
    decided = ""
    if flags.load is not None:
        own = same_folder(flags.load, flags.save)
        # With --ckpt-step, another checkpoint than the one in the tracker file is read.
        first = problem_of if flags.step else inspect
        decided = settle(flags.load, warn_rank_0, is_own=own, inspect=first)
        if flags.step:
            check_named(flags.load, flags.step, inspect)
    if flags.start is not None:
        check_named(flags.start, None, problem_of if decided else inspect)
    return decided


def check_checkpoints(flags: CheckpointFlags, check: Callable[[SavedRun], None]) -> None:
    """Check, on all ranks, the checkpoint of a program that reads it and does not write.

    Args:
        flags: The flags of the program.
        check: Refuses a checkpoint of another model.

    Raises:
        CheckpointError: The checkpoint is not whole.
    """
    if flags.load is not None:
        with shared_check(shared_store, skip=flags.skip_checksums) as inspect:
            if inspect is not None:
                check_named(flags.load, flags.step, inspect)
    for folder, step in ((flags.load, flags.step), (flags.start, None)):
        if folder is not None and holds_checkpoint(folder):
            check(read_saved_run(folder, step))
            break


def _publish(decided: str) -> None:
    if world_size() > 1:
        shared_store().set("checkpoint", decided)


def _wait_for(load: Path) -> str:
    decided = shared_store().get("checkpoint").decode()  # waits for the first rank
    if not is_seen_in_time(lambda: read_tracker(load) == decided):
        raise CheckpointError(
            f"--load {load} holds checkpoint {read_tracker(load) or 'none'!r} here and "
            f"{decided or 'none'!r} for the first rank; the folder must be on a file system that all "
            "machines share"
        )
    return decided
