"""Reads and writes of files at given offsets, with given buffers.

Mapped pages would count as resident memory, and a stream would copy once more. pread and pwrite avoid
both, and let several threads use one descriptor.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpoint_conversion.engine.regular_files import open_regular
from checkpoint_conversion.errors import ConversionError

# Bytes of a file that are written before the disk is told to begin.
_WRITEBACK_BYTES = 8 << 20
_SMALL_BYTES = 1 << 16  # the most that `append` gathers
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # only Linux has it
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class OpenFiles:
    """Files that are read at random places; each is opened once. Threads may share it."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, file: Path, offset: int, into: memoryview, what: str) -> None:
        """Fill a buffer from a file.

        Raises:
            ConversionError: When the file ends too early or cannot be read. The message names the file
                and `what`.
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
                self._descriptors[file] = _opened(lambda: open_regular(file))
            return self._descriptors[file]


class NewFile:
    """A file to write, which goes to the disk while it grows. Threads may share it, except for `append`.

    Otherwise the disk would wait for the last byte, and then the threads would wait for the disk. The
    flush at the end took a third of a conversion's time. The writer does not wait for a write to the
    disk that began early; its error comes up in `flush`. All errors name the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.end = 0  # end of the bytes that were appended
        self._small = bytearray()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._descriptor = _opened(lambda: os.open(path, flags, 0o666))
        self._lock = threading.Lock()
        self._waiting = 0

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write all of a buffer at an offset."""
        with writing(self.path):
            write_at(self._descriptor, offset, data)
        self._begin(len(data))

    def append(self, data: bytes | memoryview) -> None:
        """Write at the end; small parts may wait for the next large one."""
        if len(self._small) + len(data) > _SMALL_BYTES:
            self._append_small()
        if len(data) > _SMALL_BYTES:
            self.write_at(self.end, memoryview(data))
        else:
            self._small += data
        self.end += len(data)

    def resize(self, nbytes: int) -> None:
        """Set the size; bytes that were never written read as 0."""
        with writing(self.path):
            os.ftruncate(self._descriptor, nbytes)

    def flush(self) -> None:
        """Bring all bytes to the disk."""
        self._append_small()
        with writing(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; bytes that were not flushed may be lost."""
        os.close(self._descriptor)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append_small(self) -> None:
        data, self._small = self._small, bytearray()
        self.write_at(self.end - len(data), memoryview(data))

    def _begin(self, nbytes: int) -> None:
        with self._lock:
            self._waiting += nbytes
            begins = self._waiting >= _WRITEBACK_BYTES
            if begins:
                self._waiting = 0
        if begins and _sync_file_range is not None:
            _sync_file_range(self._descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)  # 0, 0: the whole file


def _opened(open_file: Callable[[], int]) -> int:
    """Open a file. If the process has as many open as it may, raise its limit to the system's and try again.

    A checkpoint has two files for each rank that saved it, and the usual limit is 1,024.
    """
    try:
        return open_file()
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return open_file()


def write_at(descriptor: int, offset: int, data: memoryview) -> None:
    """Write all of a buffer at an offset."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Name a file whose writing fails in the block.

    Raises:
        ConversionError: In place of an OSError, which names no file when a write fails.
    """
    try:
        yield
    except OSError as error:
        remedy = "; make room or choose another disk" if error.errno in _FULL else ""
        if error.filename not in (None, str(file)):  # the source of a copy
            raise ConversionError(f"{error.filename}: {error.strerror}") from error
        if error.strerror is None:  # raised here, with a message of its own
            raise ConversionError(str(error)) from error
        raise ConversionError(f"{file}: {error.strerror} while writing{remedy}") from error
