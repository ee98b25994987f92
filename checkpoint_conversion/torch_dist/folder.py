"""The folder of a run: which checkpoints it holds, and the tracker file that names the latest."""

from __future__ import annotations

import re
from pathlib import Path

from checkpoint_conversion.engine.regular_files import open_regular
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.torch_dist.writer import RELEASE, TRACKER

_MOST_TRACKER = 4096


def find_checkpoint(folder: str | Path, iteration: str | int | None = None) -> Path:
    """Return the folder of a checkpoint within Megatron's save folder.

    Args:
        folder: A folder with latest_checkpointed_iteration.txt, or a checkpoint itself.
        iteration: A number or "release"; None for the latest.

    Raises:
        ConversionError: When there is no such checkpoint.
    """
    folder = Path(folder)
    try:
        is_folder = folder.is_dir()
    except OSError as error:
        raise ConversionError(f"{folder}: {error.strerror}") from error
    if not is_folder:
        raise ConversionError(f"{folder}: no such folder")
    if iteration is None and (folder / ".metadata").exists():
        return folder
    if iteration is None:
        iteration = _latest(folder)
    found = folder / _iteration_name(str(iteration))
    if not found.is_dir():
        there = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise ConversionError(f"{found}: no such checkpoint; there are: {', '.join(there) or '-'}")
    return found


def _latest(folder: Path) -> str:
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise ConversionError(
            f"{folder}: neither {TRACKER} nor .metadata; not a Megatron save folder"
        )
    return read_tracker(tracker)


def read_tracker(tracker: Path) -> str:
    """Return the content of a tracker file, or its beginning if it is much too long for a number.

    Raises:
        ConversionError: The file is not a regular file.
        OSError: The file cannot be read.
    """
    with open(open_regular(tracker), "rb") as stream:
        return stream.read(_MOST_TRACKER).decode("utf-8", errors="replace").strip()


def is_iteration(text: str) -> bool:
    """Return whether a text is the number of an iteration."""
    return re.fullmatch(r"\d{1,15}", text, re.ASCII) is not None


def _iteration_name(iteration: str) -> str:
    if iteration == RELEASE:
        return RELEASE
    if not is_iteration(iteration):
        raise ConversionError(f"iteration {iteration[:40]!r} is neither a number nor '{RELEASE}'")
    return f"iter_{int(iteration):07d}"
