"""Reading and writing files at given offsets into given buffers.

Mapped pages count as resident memory, and a stream copies once more; pread and pwrite do neither and
let several threads use one descriptor.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from checkpoint_conversion.errors import ConversionError

# What is written of a file before the disk is told to begin.
_WRITEBACK_BYTES = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux has it
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class OpenFiles:
    """Files that are read at random places; each is opened once. May be shared by threads."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, file: Path, offset: int, into: memoryview, what: str) -> None:
        """Fill a buffer from a file.

        Raises:
            ConversionError: When the file ends before, or cannot be read; names it and `what` is read.
        """
        try:
            descriptor = self._descriptor(file)
            while into:
                count = os.preadv(descriptor, [into], offset)
                if count == 0:
                    raise ConversionError(f"{file}: truncated while reading {what}")
                into, offset = into[count:], offset + count
        except OSError as error:
            raise ConversionError(f"{file}: {error.strerror} while reading {what}") from error

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]


class Writeback:
    """Sends a file to the disk while it grows. May be shared by threads.

    Otherwise the disk waits for the last byte, and then the threads wait for the disk: the flush at the end
    took a third of a conversion's time. What is begun here is not waited for; errors of the disk come up
    in the flush, which must follow on the same descriptor.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._waiting = 0

    def wrote(self, nbytes: int) -> None:
        """Count bytes that were written, anywhere in the file."""
        with self._lock:
            self._waiting += nbytes
            begins = self._waiting >= _WRITEBACK_BYTES
            if begins:
                self._waiting = 0
        if begins and _sync_file_range is not None:
            _sync_file_range(self._descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)  # 0, 0: all of it


def write_at(descriptor: int, offset: int, data: memoryview) -> None:
    """Write all of a buffer."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Names a file whose writing fails in the block.

    Raises:
        ConversionError: In place of an OSError, which names no file when a write fails.
    """
    try:
        yield
    except OSError as error:
        remedy = "; make room or choose another disk" if error.errno in _FULL else ""
        raise ConversionError(f"{file}: {error.strerror} while writing{remedy}") from error
