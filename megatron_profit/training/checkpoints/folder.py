"""The checkpoints of a save folder: which are whole, which one a run resumes from, which may be removed.

Megatron's tracker file counts only when the checkpoint that it names is whole. This module uses neither torch
nor a process group: the first rank of a run decides, see `training/checkpoints/choose.py`.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_conversion.engine.output import whole_file
from checkpoint_conversion.errors import ConversionError, printable
from checkpoint_conversion.hf.folder import read_json_object
from checkpoint_conversion.torch_dist.folder import is_iteration
from checkpoint_conversion.torch_dist.folder import read_tracker as read_tracker_file
from checkpoint_conversion.torch_dist.integrity import check_whole
from checkpoint_conversion.torch_dist.writer import RELEASE, TRACKER

# The marker in each checkpoint that this project's entry wrote; only those checkpoints are ever removed.
MARKER = "megatron_profit.json"
# The means of the evaluation at a checkpoint's iteration, next to the marker.
VALIDATION = "validation.json"
_NAME = re.compile(r"iter_(\d{7,15})", re.ASCII)
# A whole checkpoint while another of the same iteration is written.
_ASIDE = ".replaced"


Inspect = Callable[[Path], str | None]


class CheckpointError(ValueError):
    """No checkpoint can be used; the message names the one that was tried, its fault and the remedy."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


@dataclass(frozen=True)
class Saved:
    """A folder in which the checkpoint of an iteration was written, or begun."""

    iteration: int
    folder: Path

    @property
    def is_own(self) -> bool:
        """True if this project's entry wrote it, in this place."""
        return not self.folder.is_symlink() and (self.folder / MARKER).is_file()

    @property
    def is_complete(self) -> bool:
        """True if its save came to its end. Unlike `problem_of`, this does not read the checkpoint."""
        return all((self.folder / name).is_file() for name in (".metadata", "metadata.json"))

    def validation(self, metric: str) -> float:
        """Return a mean of the evaluation at this iteration; NaN where there is none.

        Raises:
            CheckpointError: The file with the means is broken.
        """
        value = read_json(self.folder / VALIDATION).get(metric)
        return value if isinstance(value, float) else math.nan


def folder_of(save: Path, iteration: int) -> Path:
    """Return the folder in which Megatron writes the checkpoint of an iteration."""
    return save / f"iter_{iteration:07d}"


def same_folder(load: str | Path | None, save: str | Path | None) -> bool:
    """Return whether a run loads from the folder that it saves in, so that nobody else saves there."""
    if not load or not save:
        return False
    return Path(load).resolve() == Path(save).resolve()


def holds_checkpoint(folder: str | Path | None) -> bool:
    """Return whether a folder has a tracker file, which names the checkpoint that is read."""
    return bool(folder and (Path(folder) / TRACKER).is_file())


def saved_in(save: Path) -> list[Saved]:
    """Return the checkpoints of a save folder, newest first, whole or not."""
    found = ((entry, _NAME.fullmatch(entry.name)) for entry in save.iterdir() if entry.is_dir())
    saved = [Saved(int(match[1]), entry) for entry, match in found if match]
    return sorted(saved, key=lambda entry: entry.iteration, reverse=True)


def problem_of(folder: Path) -> str | None:
    """Return why a checkpoint cannot be loaded; None for one that is complete and runs no code.

    The tensors are not read (`checkpoint_conversion.torch_dist.integrity.check_content` reads them).
    """
    if not folder.is_dir():
        return f"{folder} is missing"
    if any(folder.glob("mp_rank_*")):
        return (
            f"{folder} is in Megatron's older format (mp_rank_…), a pickle for each rank, which is not read "
            "here; load and save it with Megatron's own script as --ckpt-format torch_dist"
        )
    try:
        check_whole(folder)
    except (ConversionError, OSError) as error:
        return str(error)
    return None


def settle(
    load: Path,
    warn: Callable[[str], None],
    *,
    is_own: bool = True,
    inspect: Inspect = problem_of,
) -> str:
    """Make the tracker file of a folder name a whole checkpoint: the one that it names, else the newest.

    Half-written and damaged checkpoints are left where they are, with a warning.

    Args:
        load: The folder; it need not exist.
        warn: Called with a line about each fault.
        is_own: Whether the run saves there too, so that nobody else does.
        inspect: Returns why a checkpoint that may be taken cannot be loaded; None for a sound one.

    Returns:
        The new content of the tracker file; "" where there is no checkpoint.

    Raises:
        CheckpointError: When there was a checkpoint and none is whole, or the file cannot be written.
    """
    try:
        if not load.is_dir():
            return ""
    except OSError as error:
        raise CheckpointError(f"{load} cannot be read: {error.strerror}") from error
    if is_own:
        restore_backup(load)
    tracker = load / TRACKER
    named = read_tracker(load)
    amiss = _problem_of_named(load, named, inspect)
    for saved in saved_in(load):
        if amiss is None and saved.iteration <= _number(named):
            break
        found = inspect(saved.folder) if amiss is not None else problem_of(saved.folder)
        if found is not None:
            warn(f"{saved.folder} is skipped, it is not whole: {found}")
        elif amiss is not None:
            warn(
                f"{amiss}; {saved.folder} is the newest whole checkpoint, and {tracker.name} names it now"
            )
            _write_tracker(tracker, saved.iteration)
            return str(saved.iteration)
    if amiss is None:
        return named
    if named:
        raise CheckpointError(
            f"{amiss}, and no other checkpoint in {load} is whole; to begin anew, name another folder or "
            f"remove {tracker}"
        )
    return ""


def read_tracker(load: Path) -> str:
    """Return the content of the tracker file; "" where there is none."""
    try:
        return read_tracker_file(load / TRACKER) or "nothing"
    except FileNotFoundError:
        return ""
    except (ConversionError, OSError) as error:
        raise CheckpointError(f"{load / TRACKER} cannot be read: {error}") from error


def check_named(load: Path, iteration: int | None, inspect: Inspect = problem_of) -> None:
    """Check a checkpoint that is asked for by name, or the latest of a folder that a run starts from.

    Args:
        load: The folder.
        iteration: The checkpoint; None for the latest.
        inspect: As in `settle`.

    Raises:
        CheckpointError: It is not whole.
    """
    named = read_tracker(load) if iteration is None else str(iteration)
    found = _problem_of_named(load, named, inspect) if named else None
    if found is not None:
        found_whole = (saved for saved in saved_in(load) if problem_of(saved.folder) is None)
        whole = ", ".join(str(saved.iteration) for saved in found_whole)
        raise CheckpointError(
            f"{found}; whole checkpoints in {load} are of iterations: {whole or 'none'}"
        )


def make_room(folder: Path) -> None:
    """Empty the place of a checkpoint that is about to be written.

    Files of a save that died are removed. A whole checkpoint is only set aside until the new one is whole
    too. Links at the names that Megatron writes are removed: it would write through them.
    """
    for link in (folder.parent / TRACKER, folder):
        if link.is_symlink() and problem_of(link) is not None:
            link.unlink()
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    aside = folder.with_name(folder.name + _ASIDE)
    if problem_of(folder) is None:
        remove_checkpoint(aside)
        folder.rename(aside)
    else:
        remove_checkpoint(folder)
    folder.mkdir()


def prune(
    save: Path,
    latest: int,
    keep_last: int,
    metric: str | None,
    protected: Container[int],
    counted: Container[int],
) -> Iterator[Path]:
    """Remove the checkpoints that are not kept.

    Args:
        save: The save folder.
        latest: The iteration that the tracker file names; it stays. Newer ones that are not complete stay
            too, as they may be being written.
        keep_last: Number of the newest that stay.
        metric: The best by this metric stays, if there is one.
        protected: Iterations that stay.
        counted: Iterations whose checkpoints the run has made or goes on from. Other whole checkpoints, as
            of a run that went further before it went back, stay and do not count.

    Yields:
        The removed folders.
    """
    own = [
        saved
        for saved in saved_in(save)
        if saved.is_own and (saved.iteration in counted or not saved.is_complete)
    ]
    complete = [saved for saved in own if saved.is_complete]
    kept = {latest, *(saved.iteration for saved in complete[:keep_last])}
    best_one = best(save, metric, counted) if metric is not None else None
    if best_one is not None:
        kept.add(best_one.iteration)
    for saved in own:
        may_be_written = saved not in complete and saved.iteration > latest
        if saved.iteration not in kept and saved.iteration not in protected and not may_be_written:
            remove_checkpoint(saved.folder)
            yield saved.folder


def backups_in(save: Path) -> list[Path]:
    """Return the checkpoints that `make_room` has set aside and nobody has removed or put back."""
    return [aside for aside in save.glob(f"iter_*{_ASIDE}") if aside.is_dir()]


def drop_replaced(folder: Path) -> None:
    """Remove the checkpoint that `make_room` has set aside, once the new one is whole."""
    remove_checkpoint(folder.with_name(folder.name + _ASIDE))


def best(save: Path, metric: str, counted: Container[int]) -> Saved | None:
    """Return the complete checkpoint with the best evaluation; None where there is none.

    Of equals, the earliest counts. `counted` is as for `prune`.
    """
    sign = better(metric)
    candidates = [
        saved
        for saved in reversed(saved_in(save))
        if saved.iteration in counted
        and saved.is_own
        and saved.is_complete
        and math.isfinite(saved.validation(metric))
    ]
    return max(candidates, key=lambda saved: sign * saved.validation(metric), default=None)


# Metrics of an evaluation that say how good a model is, and whether more is better (1) or less (-1).
BETTER = {"lm loss": -1, "objective": -1, "mean p": 1}


def better(metric: str) -> int:
    """Return whether more of a metric is better (1) or less (-1); of a task's score, more is."""
    return BETTER.get(metric, 1)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write the file atomically."""
    _write_text(file, json.dumps(content, indent=1) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty where there is no such file.

    Raises:
        CheckpointError: It is broken, or no regular file.
    """
    try:
        return read_json_object(file) if file.exists() or file.is_symlink() else {}
    except ConversionError as error:
        raise CheckpointError(f"{error}; correct it or remove it") from error


def _problem_of_named(load: Path, named: str, inspect: Inspect) -> str | None:
    """Return the fault of the checkpoint that a tracker file names, or None."""
    tracker = load / TRACKER
    if not named:
        return f"{tracker} is missing"
    if named != RELEASE and not is_iteration(named):
        return f"{tracker} holds {named[:40]!r}, which is no iteration"
    return inspect(load / RELEASE if named == RELEASE else folder_of(load, int(named)))


def _number(named: str) -> int:
    return -1 if named == RELEASE else int(named)


def restore_backup(load: Path) -> None:
    """Restore a checkpoint whose replacement was not completed, because the save died or found no space."""
    for aside in backups_in(load):
        folder = aside.with_name(aside.name.removesuffix(_ASIDE))
        if problem_of(folder) is None:
            remove_checkpoint(aside)
        else:
            remove_checkpoint(folder)
            aside.rename(folder)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint so that an interruption leaves one that is recognisably not whole."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        (folder / ".metadata").unlink(missing_ok=True)
        shutil.rmtree(folder)


def _write_tracker(tracker: Path, iteration: int) -> None:
    try:
        _write_text(tracker, str(iteration))
    except OSError as error:
        raise CheckpointError(
            f"{tracker} cannot be written ({error}), and has to name iteration {iteration}, the newest whole "
            "checkpoint; write that number into it"
        ) from error


def _write_text(file: Path, text: str) -> None:
    with whole_file(file) as stream:
        stream.write(text.encode())
