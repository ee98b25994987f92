"""Output folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from checkpoint_conversion.engine.lock import lock_file
from checkpoint_conversion.engine.raw_files import writing
from checkpoint_conversion.engine.regular_files import kind_of, read_regular
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.progress import human

_SPARE_BYTES = 16 << 20  # for headers, metadata and tokenizer
# A file next to the output's files. It says which command wrote them, and their sizes.
MARKER = ".checkpoint_conversion.json"
# Age at which an unfinished file is a dead writer's, on whatever machine it ran.
_STALE_SECONDS = 24 * 3600
_UNFINISHED = ".unfinished"


@contextlib.contextmanager
def whole_folder(
    out: Path,
    sources: Iterable[Path],
    overwrite: bool,
    command: str,
    needed: int,
) -> Iterator[Path]:
    """Yield a temporary folder next to `out`; it becomes `out` when the block ends without an error.

    The next run for the same output removes the remains of an interrupted run. On a file system with
    locks, a lock keeps a second run out. The lock ends with the process, however the process ends.

    Args:
        out: The folder to make; missing, empty, or to be replaced.
        sources: Folders that are read; they must not be replaced.
        overwrite: Whether a folder that is not empty may be replaced.
        command: The command that writes the folder. `overwrite` replaces only a folder that the same
            command wrote, according to a file in it (`MARKER`).
        needed: Bytes that will be written.

    Raises:
        ConversionError: When the folder must not be written, there is too little space, or another
            process is writing it.
    """
    out = _resolved(out)
    _check_sources(out, sources)
    _check_place(out)
    _check_space(out, needed)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    with _claim(partial):
        try:
            _remove(partial)
            partial.mkdir()
            _recover(out)
            _check_replaceable(out, overwrite, command)
            yield partial
            _mark(partial, command)
            for folder in (entry for entry in partial.rglob("*") if not _is_file(entry)):
                sync_file(folder)
            sync_file(partial)
            _replace(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def check_output(
    out: Path, sources: Iterable[Path], overwrite: bool, command: str, needed: int
) -> None:
    """Check before some work whether its output folder can be written at the end.

    Args:
        out, sources, overwrite, command, needed: As `whole_folder` will be given them.

    Raises:
        ConversionError: When the folder holds something or an input, its place is not writable, or
            there is too little space.
    """
    out = _resolved(out)
    _check_sources(out, sources)
    _check_replaceable(out, overwrite, command)
    _check_place(out)
    _check_space(out, needed)


def check_apart(one: Path, other: Path) -> None:
    """Refuse two output folders of which one is, or holds, the other.

    Raises:
        ConversionError: Names both.
    """
    here, there = _resolved(one), _resolved(other)
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise ConversionError(
            f"{one} and {other} are two outputs in one place; choose another folder"
        )


def write_file(file: Path, content: bytes) -> None:
    """Write a small file, whole or not at all, and flush it to the disk.

    Raises:
        ConversionError: When that fails; the message names the file.
    """
    with writing(file), whole_file(file) as stream:
        stream.write(content)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write small files, given by name, into a folder and folders in it; raises as `write_file`."""
    for name, content in files.items():
        with writing(folder / name):
            (folder / name).parent.mkdir(exist_ok=True)
        write_file(folder / name, content)


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[BinaryIO]:
    """Yield a stream into a new file, which takes the name `file` when the block ends without an error.

    The stream never writes through a link: somebody else may write into the folder too. A link in the
    place of `file` is replaced, not followed. Processes of several machines may write the same file at
    the same time; the last one to finish counts.

    Raises:
        OSError: The file cannot be written, or something else has its name, for example /dev/null.
    """
    with contextlib.suppress(FileNotFoundError):
        if (kind := kind_of(file.stat().st_mode)) is not None:
            raise OSError(f"{file} is {kind}; name a file")
    _remove_stale(file)
    # A name of its own: another writer must neither remove this file nor find its name taken.
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}{_UNFINISHED}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(unfinished, flags, 0o666), "wb") as stream:
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            unfinished.replace(file)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def _remove_stale(file: Path) -> None:
    """Remove what writers of a file have left that died long ago."""
    for left_over in file.parent.glob(f".{glob.escape(file.name)}.*{_UNFINISHED}"):
        with contextlib.suppress(OSError):  # another writer has removed it
            if time.time() - left_over.lstat().st_mtime > _STALE_SECONDS:
                left_over.unlink()


def sync_file(file: Path) -> None:
    """Flush a file or a folder to the disk.

    Raises:
        ConversionError: When that fails; the message names the file.
    """
    with writing(file):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _resolved(out: Path) -> Path:
    """Return the output folder without links.

    Raises:
        ConversionError: No folder can be there. For example, links form a circle, or a name is too
            long.
    """
    try:
        found = out.resolve()
        found.exists()
    except OSError as error:
        raise ConversionError(f"{out}: {error.strerror}; choose another folder") from error
    except (RuntimeError, ValueError) as error:  # a circle of links, for Python 3.12
        raise ConversionError(f"{out}: {error}; choose another folder") from error
    return found


def _check_sources(out: Path, sources: Iterable[Path]) -> None:
    if any(source.resolve().is_relative_to(out) for source in sources):
        raise ConversionError(f"{out}: the output folder holds an input; choose another")


def _check_place(out: Path) -> None:
    """Check that a folder can be made next to `out` and take its name."""
    place = nearest_existing(out.parent)
    if not place.is_dir():
        raise ConversionError(f"{out}: {place} is a file; choose another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConversionError(f"{out}: {place} is not writable; choose another folder")
    if os.path.ismount(out):
        raise ConversionError(
            f"{out} is a mount point, which cannot be replaced; give a folder in it"
        )


def nearest_existing(path: Path) -> Path:
    """Return a path if it exists, else the nearest of its parents that does."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def problem_of_place(folder: Path) -> str | None:
    """Say why a folder can neither be written to nor made, and the remedy; None where it can."""
    place = nearest_existing(folder)
    if not place.is_dir():
        return f"{place} is a file; name a folder"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} cannot be written to; name another folder"
    return None


def _check_space(out: Path, needed: int) -> None:
    existing = nearest_existing(out)
    free = shutil.disk_usage(existing).free
    if free < needed + _SPARE_BYTES:
        raise ConversionError(
            f"{existing}: {human(free)} free on the disk, {human(needed + _SPARE_BYTES)} needed"
        )


def _check_replaceable(out: Path, overwrite: bool, command: str) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ConversionError(f"{out} is a file; the output must be a folder")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise ConversionError(
            f"{out} is not empty; choose another folder, or give a conversion --overwrite"
        )
    if reason := _foreign(out, command):
        raise ConversionError(
            f"{out} is no earlier output of this command ({reason}), and --overwrite replaces only "
            "that; choose another folder, or empty this one"
        )


def _mark(folder: Path, command: str) -> None:
    """Write into a folder which command filled it, and the sizes of its files."""
    content = {"command": command, "sizes": _sizes(folder)}
    write_file(folder / MARKER, f"{json.dumps(content, indent=2)}\n".encode())


def _foreign(out: Path, command: str) -> str | None:
    """Return why a folder is not the unchanged output of a command, or None if it is."""
    try:
        content = json.loads(read_regular(out / MARKER))
        written, sizes = content["command"], dict(content["sizes"])
    except FileNotFoundError:
        return f"it has no {MARKER}"
    except (ConversionError, ValueError, KeyError, TypeError, RecursionError):
        return f"its {MARKER} was changed"
    if written != command:
        return f"{written} wrote it"
    for name, size in _sizes(out).items():
        if name not in sizes:
            return f"it holds {name}"
        if size != sizes[name]:
            return f"its {name} was changed"
    return None


def _sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file below a folder, except the marker; 0 for folders."""
    return {
        str(entry.relative_to(folder)): entry.lstat().st_size if _is_file(entry) else 0
        for entry in sorted(folder.rglob("*"))
        if entry != folder / MARKER
    }


def _is_file(entry: Path) -> bool:
    return entry.is_symlink() or not entry.is_dir()


def remove_folder(folder: Path) -> None:
    """Remove a folder so that an interruption leaves no part of it under its name.

    What an interruption or an error leaves has another name, and the next removal of the same folder
    removes it.

    Raises:
        OSError: It cannot be taken away from its name.
    """
    removed = folder.with_name(f".{folder.name}.removed")
    with contextlib.suppress(OSError):
        _remove(removed)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(removed)
    with contextlib.suppress(OSError):
        _remove(removed)


def _claim(partial: Path) -> contextlib.ExitStack:
    """Keep other processes from a temporary folder until the end of the `with` block."""
    claim = contextlib.ExitStack()
    try:
        claim.enter_context(lock_file(partial.with_suffix(".lock"), patience=0))
    except BlockingIOError:
        raise ConversionError(f"{partial}: another conversion is writing here") from None
    return claim


def _remove(entry: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        entry.unlink() if _is_file(entry) else shutil.rmtree(entry)


def _replace(partial: Path, out: Path) -> None:
    """Put the complete folder in the place of `out`."""
    old = _back_up(out)
    if out.exists() and any(out.iterdir()):
        out.rename(old)
    partial.rename(out)
    sync_file(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _recover(out: Path) -> None:
    """Complete or undo a replacement that was interrupted after its first rename."""
    old = _back_up(out)
    if old.is_dir() and out.exists():
        shutil.rmtree(old)
    elif old.is_dir():
        old.rename(out)


def _back_up(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")
