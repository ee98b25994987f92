"""Checksums of parts, against zlib's of the whole."""

from __future__ import annotations

import random
import zlib

from checkpoint_conversion.engine.checksums import PartialChecksums, crc32, crc32_combine


def _cuts(generator, size):
    places = sorted(generator.sample(range(1, size), 9))
    return list(zip([0, *places], [*places, size], strict=True))


def test_parts_in_any_order_give_the_checksum_of_the_whole():
    generator = random.Random(1)
    checksums = PartialChecksums()
    for size in (10, 100, 5000):
        data = memoryview(generator.randbytes(size))
        parts = _cuts(generator, size)
        generator.shuffle(parts)
        found = [checksums.add("entry", start, data[start:end], size) for start, end in parts]
        assert found == [None] * 9 + [zlib.crc32(data)]
    assert checksums.open_entries() == []


def test_long_runs():
    for one, other in ((b"", b"ab"), (b"ab", b""), (b"a" * 3_000_000, b"b" * (2**20 + 1))):
        assert crc32(one) == zlib.crc32(one)
        assert crc32_combine(crc32(one), crc32(other), len(other)) == zlib.crc32(one + other)


def test_what_was_not_read_is_known():
    checksums, data = PartialChecksums(), memoryview(b"0123456789")
    checksums.add("entry", 2, data[2:4], 10)
    checksums.add("entry", 6, data[6:9], 10)
    assert checksums.open_entries() == ["entry"]
    assert checksums.gaps("entry", 10) == [(0, 2), (4, 2), (9, 1)]


def test_parts_that_overlap_give_no_checksum():
    checksums, data = PartialChecksums(), memoryview(b"0123456789")
    assert checksums.add("entry", 0, data[:6], 10) is None
    assert checksums.add("entry", 4, data[4:8], 10) is None
