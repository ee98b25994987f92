"""The zip archives that torch.save writes, read strictly (PKWARE's APPNOTE 4.3).

A zip archive states the places and names of its records twice: in a directory at its end, and before
each record. Programs differ in which of the two they believe. So an archive is accepted here only on
these conditions:

- The two agree.
- The records fill it from its first byte on without gaps.
- No two records have the same name.

Then there is one way to read it. Records must not be compressed: torch never does it, and a few bytes
could become gigabytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from checkpoint_conversion.engine.checksums import crc32
from checkpoint_conversion.pickles.reader import read_pickle
from checkpoint_conversion.pickles.uses import STORAGES, is_size
from checkpoint_conversion.pickles.values import Named, PersistentId, Uses

# Bytes that one read brings into the core's cache.
_PART_BYTES = 1 << 20
# The directory of a state dict with some 100,000 tensors, and the pickle of one, are smaller.
_MOST_DIRECTORY = _MOST_PICKLE = 64 << 20
_END, _FAR_END, _LOCATOR = (
    struct.Struct("<4s4H2IH"),
    struct.Struct("<4sQ2H2I4Q"),
    struct.Struct("<4sIQI"),
)
_ENTRY, _HEADER = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")
_SIZES_FOLLOW, _UTF8 = 1 << 3, 1 << 11
# An attribute. For a folder, torch's reader would return whatever is in memory as its content.
_FOLDER = 1 << 4
_IN_64_BITS = 0xFFFFFFFF
_KNOWN = (
    "data.pkl",
    "byteorder",
    "version",
    ".format_version",
    ".storage_alignment",
    ".data/serialization_id",
)

Read = Callable[[int, int], bytes | bytearray]


class ArchiveError(ValueError):
    """The bytes are not an archive of torch.save, or the archive is damaged."""


@dataclass(frozen=True)
class Record:
    """The place of a record in an archive.

    Attributes:
        offset: Its first byte in the archive.
        checksum: CRC-32; None where torch was told to make none.
    """

    name: str
    offset: int
    nbytes: int
    checksum: int | None


@dataclass(frozen=True)
class Archive:
    """An archive whose structure is sound.

    Attributes:
        read: Gives the bytes [offset, offset + count).
        records: The records by their names in the archive's single folder.
    """

    read: Read
    records: dict[str, Record]

    def content(self, uses: Uses) -> Any:
        """Return the value of the archive's pickle; a storage is a PersistentId.

        Raises:
            ValueError: The pickle is broken, too large or damaged, or names a forbidden class or
                function.
        """
        order = self.records.get("byteorder")
        if order is not None and self.read(order.offset, order.nbytes) != b"little":
            raise ArchiveError("its bytes are in big-endian order")
        record = self.records["data.pkl"]
        if record.nbytes > _MOST_PICKLE:
            raise ArchiveError(f"its pickle has {record.nbytes} bytes; the limit is {_MOST_PICKLE}")
        self.check(record)
        content = bytes(self.read(record.offset, record.nbytes))
        return read_pickle(content, uses, self._storage)

    def check(self, record: Record) -> None:
        """Compare the checksum of a record with its bytes.

        Raises:
            ArchiveError: The two differ.
        """
        found = 0
        for start in range(0, record.nbytes, _PART_BYTES):
            count = min(_PART_BYTES, record.nbytes - start)
            found = crc32(self.read(record.offset + start, count), found)
        if record.checksum not in (None, found):
            raise ArchiveError(
                f"damaged: the checksum of {record.name} is {found:08x}, the file says "
                f"{record.checksum:08x}"
            )

    def _storage(self, identity: Any) -> PersistentId:
        """Return the reference to a storage, after a check that the storage is there in full.

        torch trusts the number of elements in the reference. If it were too large, torch would read the
        memory after the storage.
        """
        match identity:
            case ("storage", Named() as kind, str(key), str(), elements) if (
                kind in STORAGES and is_size(elements)
            ):
                record = self.records.get(f"data/{key}")
                if record is None or record.nbytes != elements * STORAGES[kind]:
                    raise ValueError(f"{kind.name} {key} of {elements} elements is not there")
                return PersistentId(identity)
        raise ValueError("it is no storage")


def read_archive(read: Read, nbytes: int) -> Archive:
    """Return the archive that the first `nbytes` bytes of a source hold; only its structure is read.

    Raises:
        ArchiveError: The bytes are not an archive, or not one that torch.save writes.
    """
    try:
        entries, end = _directory(read, nbytes)
        records = {}
        at, folder = 0, None
        for entry in entries:
            record, at = _record(read, entry, at)
            first, _, name = record.name.partition("/")
            folder = first if folder is None else folder
            lower = name.lower()  # torch's reader ignores case
            if first != folder or lower in records or not _is_known(name):
                raise ArchiveError(f"it has a record {record.name!r} too many")
            records[lower] = Record(name, record.offset, record.nbytes, record.checksum)
    except (struct.error, UnicodeDecodeError) as error:
        raise ArchiveError("it is no archive of torch.save, or was cut off") from error
    if at != end:
        raise ArchiveError("its records do not fill it")
    if "data.pkl" not in records:
        raise ArchiveError("it has no record data.pkl")
    return Archive(read, records)


def _is_known(name: str) -> bool:
    key = name.removeprefix("data/")
    return name in _KNOWN or (key != name and key.isascii() and key.isdigit())


def _directory(read: Read, nbytes: int) -> tuple[Iterator[_Entry], int]:
    """Return the entries of the directory, and the offset of its first byte.

    The directory is at the archive's end, without a comment. torch writes its size and place again in
    64 bits.
    """
    end = nbytes - _END.size
    if end < 0:
        raise ArchiveError("it is no archive of torch.save, or was cut off")
    mark, *disks, here, count, size, start, comment = _END.unpack(read(end, _END.size))
    if mark != b"PK\5\6" or any(disks) or here != count or comment:
        raise ArchiveError("it is no archive of torch.save, or was cut off")
    far = end - _LOCATOR.size - _FAR_END.size
    if far >= 0 and read(far, 4) == b"PK\6\6":
        end = far
        count, size, start = _far_directory(read, far, (count, size, start))
    if start + size != end or size > _MOST_DIRECTORY or count * _ENTRY.size > size:
        raise ArchiveError("its directory is not at its end")
    return _entries(bytes(read(start, size)), count), start


def _far_directory(read: Read, far: int, near: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the number of entries, size and offset of the directory, from the records for large archives."""
    _, size, _, _, *disks, here, count, nbytes, start = _FAR_END.unpack(read(far, _FAR_END.size))
    locator = _LOCATOR.unpack(read(far + _FAR_END.size, _LOCATOR.size))
    found = count, nbytes, start
    limits = 0xFFFF, _IN_64_BITS, _IN_64_BITS
    agree = all(n in (f, limit) for f, n, limit in zip(found, near, limits, strict=True))
    if size != _FAR_END.size - 12 or any(disks) or here != count or not agree:
        raise ArchiveError("its two directories disagree")
    if locator != (b"PK\6\7", 0, far, 1):
        raise ArchiveError("its two directories disagree")
    return found


@dataclass(frozen=True)
class _Entry:
    """A record as the directory describes it."""

    name: bytes
    flags: int
    checksum: int
    nbytes: int
    offset: int


def _entries(directory: bytes, count: int) -> Iterator[_Entry]:
    at = 0
    for _ in range(count):
        mark, _, _, flags, method, _, _, checksum, packed, size, *rest = _ENTRY.unpack_from(
            directory, at
        )
        name_length, extra_length, comment, disk, _, attributes, offset = rest
        at += _ENTRY.size
        name = directory[at : at + name_length]
        extra = directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length
        is_other = comment or disk or flags & ~(_SIZES_FOLLOW | _UTF8) or attributes & _FOLDER
        if mark != b"PK\1\2" or is_other:
            raise ArchiveError("its directory is broken")
        if method:
            raise ArchiveError(f"its record {name.decode('utf-8', 'replace')!r} is compressed")
        size, packed, offset = _wide(extra, (size, packed, offset))
        if size != packed:
            raise ArchiveError("its directory is broken")
        yield _Entry(name, flags, checksum, size, offset)
    if at != len(directory):
        raise ArchiveError("its directory is broken")


def _wide(extra: bytes, values: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return size, packed size and offset; a number that exceeds 32 bits is in the extra field."""
    wide = [value == _IN_64_BITS for value in values]
    expected = b"" if not any(wide) else struct.pack("<2H", 1, 8 * sum(wide))
    if extra[:4] != expected or len(extra) != len(expected) + 8 * sum(wide):
        raise ArchiveError("its directory is broken")
    numbers = iter(struct.unpack(f"<{sum(wide)}Q", extra[len(expected) :]))
    size, packed, offset = (
        next(numbers) if is_wide else v for v, is_wide in zip(values, wide, strict=True)
    )
    return size, packed, offset


def _record(read: Read, entry: _Entry, at: int) -> tuple[Record, int]:
    """Return the record of an entry, which must begin at `at`, and its end."""
    head = read(at, _HEADER.size)
    mark, _, flags, method, _, _, checksum, packed, size, name_length, extra_length = (
        _HEADER.unpack(head)
    )
    start = at + _HEADER.size + name_length + extra_length
    sizes = (entry.checksum, entry.nbytes, entry.nbytes)
    follow = bool(flags & _SIZES_FOLLOW)
    said = (checksum, packed, size)
    wide = (entry.checksum, _IN_64_BITS, _IN_64_BITS)
    agree = (
        mark == b"PK\3\4"
        and (entry.offset, entry.flags, 0) == (at, flags, method)
        and (said in ((0, 0, 0), (0, *wide[1:])) if follow else said in (sizes, wide))
        and read(at + _HEADER.size, name_length) == entry.name
    )
    if not agree:
        raise ArchiveError(f"its directory and its record {entry.name.decode()!r} disagree")
    end = start + entry.nbytes
    if follow:
        end = _descriptor(read, end, sizes)
    # torch.serialization.set_crc32_options(False) leaves 0.
    return Record(entry.name.decode(), start, entry.nbytes, entry.checksum or None), end


def _descriptor(read: Read, at: int, sizes: tuple[int, int, int]) -> int:
    """Return the end of the description that follows a record; its sizes may have 64 bits."""
    for form in ("<4s3I", "<4sI2Q"):
        length = struct.calcsize(form)
        fits = max(sizes) <= _IN_64_BITS or form == "<4sI2Q"
        if fits and read(at, length) == struct.pack(form, b"PK\7\x08", *sizes):
            return at + length
    raise ArchiveError("its directory and its records disagree")
