"""Reading and writing files at given offsets into given buffers.

Mapped pages count as resident memory, and a stream copies once more; pread and pwrite do neither and
let several threads use one descriptor.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from checkpoint_conversion.errors import ConversionError


class OpenFiles:
    """Files that are read at random places; each is opened once. May be shared by threads."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, file: Path, offset: int, into: memoryview, what: str) -> None:
        """Fill a buffer from a file.

        Raises:
            ConversionError: When the file ends before; names it and `what` is read.
        """
        descriptor = self._descriptor(file)
        while into:
            count = os.preadv(descriptor, [into], offset)
            if count == 0:
                raise ConversionError(f"{file}: truncated while reading {what}")
            into, offset = into[count:], offset + count

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


def write_at(descriptor: int, offset: int, data: memoryview) -> None:
    """Write all of a buffer."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
