"""Folders whose files are checked before use: a disk, a copy or another program may have changed them.

`checksums.json` holds the size and the CRC-32 of each file, and the name of the folder. So a folder that was
put in another's place is found. Damage to `checksums.json` itself is found too: it no longer fits the files.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from isal.isal_zlib import crc32  # ten times as fast as zlib's

from checkpoint_conversion.engine.lock import NoLocksError, take_lock
from checkpoint_conversion.errors import escaped, warn
from megatron_profit.data.errors import DataError, shown
from megatron_profit.data.files.bounded import check_regular, read_json

_CHECKSUMS = "checksums.json"
# The entry of the folder's name, which no file has.
_FOLDER = "/"
_BLOCK = 8 * 2**20
_PROGRESS_SECONDS = 2.0

type Progress = Callable[[str], None] | None


class DamagedError(Exception):
    """A file has changed since it was written; the message names it."""


class CheckedFiles:
    """The files of a new folder, written in pieces; they are complete after `finish`."""

    def __init__(self, folder: Path) -> None:
        """Make the folder.

        Args:
            folder: Its name without the suffix is the one that it is used under.

        Raises:
            OSError: It cannot be made. The methods raise it too, when the disk is full.
        """
        folder.mkdir()
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._checksums: dict[str, int] = {}

    def append(self, name: str, content: bytes | npt.NDArray[np.generic]) -> None:
        """Write at the end of the file of a name."""
        plain = np.frombuffer(content, np.uint8) if isinstance(content, bytes) else content
        data = np.ascontiguousarray(plain).view(np.uint8).data
        if name not in self._files:
            self._files[name] = (self._folder / name).open("xb")
        self._files[name].write(data)
        self._checksums[name] = crc32(data, self._checksums.get(name, 0))

    def finish(self) -> None:
        """Write the checksums, and bring everything to the disk."""
        entries: dict[str, Any] = {
            name: {"bytes": file.tell(), "crc32": f"{self._checksums[name]:08x}"}
            for name, file in self._files.items()
        }
        entries[_FOLDER] = self._folder.stem
        self.append(_CHECKSUMS, json.dumps(entries, indent=1).encode())
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> CheckedFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()


def is_usable(folder: Path, names: Collection[str], progress: Progress = None) -> bool:
    """Return whether a folder exists and is unchanged since it was written.

    A damaged one is renamed with a warning, so that it can be made again. It is not removed, because a run
    that uses it goes on.

    Args:
        folder: A folder that `CheckedFiles` wrote.
        names: The files that must be there.
        progress: Called with a line of text about every two seconds.

    Raises:
        OSError: A file cannot be read, or a damaged folder cannot be renamed.
    """
    try:
        checked = folder.stat().st_ino
        _check_once(folder, names, progress)
    except FileNotFoundError:
        return False
    except (DamagedError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EIO:
            raise
        _put_aside(folder, checked, error)
        return False
    return True


def _put_aside(folder: Path, number: int, why: Exception) -> None:
    """Rename a damaged folder, if it still is the one with this inode number, and print a warning."""
    aside = folder.with_suffix(f".damaged-{uuid.uuid4().hex[:8]}")
    try:
        if folder.stat().st_ino == number:
            folder.rename(aside)
    except FileNotFoundError:  # another process was faster
        return
    except OSError as error:
        raise OSError(f"{folder} is damaged ({why}) and cannot be renamed: {error}") from error
    warn(
        f"{folder} is damaged ({why}) and is made again; the damaged one is now {aside.name}, which may be "
        "deleted",
        sys.stderr,
    )


def _check_once(folder: Path, names: Collection[str], progress: Progress) -> None:
    """Call `_check`, unless another process of this machine is doing so: then wait until that one succeeds.

    So the processes of a start read the files once, where that takes long. Errors are the same as for
    `_check`.
    """
    try:
        note = os.open(
            folder / f"checked-{machine_name()}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666
        )
    except FileNotFoundError:
        raise
    except OSError:  # a folder that may only be read
        _check(folder, names, progress)
        return
    try:
        before = os.pread(note, 16, 0)
        with contextlib.suppress(OSError, NoLocksError):
            take_lock(note)
        if os.pread(note, 16, 0) == before:
            _check(folder, names, progress)
            with contextlib.suppress(OSError):  # a full disk: the others check for themselves
                os.pwrite(note, uuid.uuid4().bytes, 0)
    finally:
        os.close(note)


def _check(folder: Path, names: Collection[str], progress: Progress) -> None:
    """Compare the files of a folder with their checksums.

    Raises:
        DamagedError: A file is missing, or has changed since it was written.
        OSError: A file cannot be read, or there is no such folder.
    """
    expected = _expected(folder, names)
    total, done, told = sum(size for size, _ in expected.values()), 0, time.monotonic()
    buffer = memoryview(bytearray(_BLOCK))
    for name, (_, checksum) in expected.items():
        found = 0
        with io.FileIO(str(folder / name)) as file:
            while count := file.readinto(buffer):
                found, done = crc32(buffer[:count], found), done + count
                if progress and time.monotonic() - told > _PROGRESS_SECONDS:
                    told = time.monotonic()
                    part = f"{done / 1e9:,.1f} of {total / 1e9:,.1f} GB"
                    progress(f"checking {escaped(folder)}: {part}")
        if f"{found:08x}" != checksum:
            raise DamagedError(f"{name} has the CRC-32 {found:08x}, not {shown(checksum)}")


def _expected(folder: Path, names: Collection[str]) -> dict[str, tuple[int, str]]:
    """Return the bytes and the CRC-32 that each file must have; the files have this size already."""
    folder.stat()
    try:
        entries = read_json(folder / _CHECKSUMS)
        expected = {name: (entries[name]["bytes"], entries[name]["crc32"]) for name in names}
        written = entries[_FOLDER]
    except (DataError, KeyError, TypeError) as error:
        raise DamagedError(f"{_CHECKSUMS} cannot be used: {error}") from error
    if written != folder.name:
        raise DamagedError(f"it holds what was written as {shown(written)}")
    for name, (size, _) in expected.items():
        try:
            check_regular(folder / name)
            found = (folder / name).stat().st_size
        except (DataError, FileNotFoundError) as error:
            raise DamagedError(f"{name} is missing or no regular file") from error
        if found != size:
            raise DamagedError(f"{name} has {found:,} bytes, not {shown(size)}")
    return expected


@functools.cache
def machine_name() -> str:
    """Return a name of this machine since its start.

    Other machines with the same files have other names.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname().replace(".", "-")
