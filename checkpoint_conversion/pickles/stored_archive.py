"""Zip archives without compression, written front to back (PKWARE's APPNOTE 4.3).

zipfile writes the same bytes, but computes checksums with zlib, which takes a third of a conversion's
time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

from checkpoint_conversion.engine.checksums import crc32

_VERSION = 20  # 2.0, the first with the features that are used here
_UNIX = 3 << 8
_SIZES_FOLLOW = 1 << 3  # checksum and sizes come after the bytes
_STORED = 0
_TIME, _DATE = 0, 1 << 5 | 1  # 1980-01-01, so that archives of the same content are the same
_OWNER_READS_AND_WRITES = 0o600 << 16


class StoredArchive:
    """An archive of less than 4 GiB, at the end of a file.

    Args:
        append: Writes at the end of the file. Offsets in the archive count from its own beginning.
    """

    def __init__(self, append: Callable[[bytes | memoryview], None]) -> None:
        self._append = append
        self._end = 0
        self._directory: list[bytes] = []

    def add(self, name: str, data: Iterable[bytes | memoryview]) -> None:
        """Write a record of bytes, part by part."""
        start, encoded = self._end, name.encode()
        common = (_VERSION, _SIZES_FOLLOW, _STORED, _TIME, _DATE)
        self._write(struct.pack("<4s5H3I2H", b"PK\3\4", *common, 0, 0, 0, len(encoded), 0))
        self._write(encoded)
        checksum = size = 0
        for part in data:
            checksum, size = crc32(part, checksum), size + len(part)
            self._write(part)
        found = (checksum, size, size)
        self._write(struct.pack("<4s3I", b"PK\7\x08", *found))
        # Lengths of the extra field and the comment; the disk; attributes of the content.
        nothing = (0, 0, 0, 0)
        fields = (*common, *found, len(encoded), *nothing, _OWNER_READS_AND_WRITES, start)
        self._directory.append(
            struct.pack("<4s6H3I5H2I", b"PK\1\2", _UNIX | _VERSION, *fields) + encoded
        )

    def close(self) -> None:
        """Write the directory; the file stays open."""
        start, directory = self._end, b"".join(self._directory)
        count = len(self._directory)
        self._write(directory)
        end = (0, 0, count, count, len(directory), start, 0)
        self._write(struct.pack("<4s4H2IH", b"PK\5\6", *end))

    def _write(self, data: bytes | memoryview) -> None:
        self._append(data)
        self._end += len(data)
