"""Archives of torch.save: read where there is one way to read them."""

from __future__ import annotations

import io
import itertools
import pickle
import struct
import zipfile

import pytest
import torch
from hostile_files import archive, saved

from checkpoint_conversion.pickles.archive import Archive, ArchiveError, read_archive
from checkpoint_conversion.pickles.torch_pickle import locate_tensor, tensor_pickle, write_archive
from checkpoint_conversion.pickles.uses import OBJECTS, TENSORS, within
from checkpoint_conversion.pickles.values import PickleError


def in_memory(content: bytes) -> Archive:
    return read_archive(lambda start, count: content[start : start + count], len(content))


def checked(content: bytes) -> Archive:
    """An archive with all its checksums compared, and the tensor in it located."""
    found = in_memory(content)
    for record in found.records.values():
        found.check(record)
    locate_tensor(found)
    return found


def test_archives_of_torch_and_of_this_project_are_read():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.arange(6).view(2, 3).to(dtype)
        stored = locate_tensor(checked(saved(tensor)))
        assert (stored.shape, stored.strides, stored.dtype.torch) == (
            (2, 3),
            (3, 1),
            str(dtype)[6:],
        )
    out = bytearray()
    data = memoryview(bytes(24))
    write_archive(out.extend, tensor_pickle(stored.dtype, (2, 6)), [data])
    assert locate_tensor(checked(bytes(out))).nbytes == 24
    for value in ([None], [torch.empty(0, dtype=torch.uint8)], {"a": 1}):
        in_memory(saved(value)).content(within(OBJECTS))


def test_newer_dtypes_are_read():
    for dtype in (torch.uint16, torch.float8_e4m3fn, torch.bool, torch.int64):
        in_memory(saved(torch.ones(5).to(dtype))).content(within(TENSORS))


def test_an_archive_of_more_than_4_gib():
    """Only its structure is read; the data are zeros that exist nowhere."""
    size = 5 << 30
    small = saved(torch.zeros(8, dtype=torch.uint8))
    data = in_memory(small).records["data/0"]
    # What torch writes for a large record: sizes of 64 bits after it and in the directory.
    content = _grown(small, data.offset, size)
    found = read_archive(content.read, content.nbytes)
    assert found.records["data/0"].nbytes == size


class _grown:
    """An archive whose tensor of 8 bytes has `size` bytes, laid out as miniz does."""

    def __init__(self, small: bytes, at: int, size: int) -> None:
        self._head, self._at, self._size = small[:at], at, size
        grown = size - 8 + 8  # the data, and the sizes after it
        tail = bytearray()
        found = in_memory(small)
        order = sorted(found.records.values(), key=lambda record: record.offset)
        number = [record.name for record in order].index("data/0")
        descriptor = small[at + 8 : at + 24]
        tail += descriptor[:8] + struct.pack("<2Q", size, size)
        end = struct.unpack("<4s4H2IH", small[-22:])
        directory = small[end[6] : end[6] + end[5]]
        tail += small[at + 24 : end[6]]
        start = len(self._head) + size + len(tail)
        rest, position = bytearray(), 0
        for index in range(end[4]):
            fields = list(struct.unpack_from("<4s6H3I5H2I", directory, position))
            name = directory[position + 46 : position + 46 + fields[10]]
            position += 46 + fields[10] + fields[11]
            extra = b""
            if index == number:
                fields[8] = fields[9] = 0xFFFFFFFF
                extra = struct.pack("<2H2Q", 1, 16, size, size)
            elif index > number:
                extra = struct.pack("<2HQ", 1, 8, fields[16] + grown)
                fields[16] = 0xFFFFFFFF
            fields[11] = len(extra)
            rest += struct.pack("<4s6H3I5H2I", *fields) + name + extra
        far = start + len(rest)
        count = end[4]
        rest += struct.pack(
            "<4sQ2H2I4Q", b"PK\6\6", 44, 30, 45, 0, 0, count, count, len(rest), start
        )
        rest += struct.pack("<4sIQI", b"PK\6\7", 0, far, 1)
        rest += struct.pack(
            "<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(rest) - 76, 0xFFFFFFFF, 0
        )
        self._tail = bytes(tail + rest)
        self.nbytes = len(self._head) + size + len(self._tail)

    def read(self, start: int, count: int) -> bytes:
        assert count < 1 << 20, "the data are not read"
        return bytes(self._byte(i) for i in range(start, min(start + count, self.nbytes)))

    def _byte(self, index: int) -> int:
        if index < self._at:
            return self._head[index]
        after = index - self._at - self._size
        return 0 if after < 0 else self._tail[after]


@pytest.mark.parametrize("form", ["torch", "this project"])
def test_every_flipped_bit_is_found_or_without_effect(form):
    tensor = torch.arange(5.0)
    if form == "torch":
        content = saved(tensor)
    else:
        out = bytearray()
        dtype = locate_tensor(in_memory(saved(tensor))).dtype
        write_archive(
            out.extend, tensor_pickle(dtype, (5,)), [memoryview(tensor.numpy().tobytes())]
        )
        content = bytes(out)
    silent = 0
    for index, bit in itertools.product(range(len(content)), range(8)):
        flipped = bytearray(content)
        flipped[index] ^= 1 << bit
        try:
            checked(bytes(flipped))
        except ValueError:
            continue
        silent += 1
        loaded = torch.load(io.BytesIO(flipped), weights_only=True)
        assert torch.equal(loaded, tensor), f"bit {bit} of byte {index}"
    assert silent > 0, "times, versions and padding have no effect"


def _raw(*records: tuple[str, bytes], **fields: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, content in records:
            info = zipfile.ZipInfo(name)
            for field, value in fields.items():
                setattr(info, field, value)
            file.writestr(info, content, compress_type=fields.get("compress_type"))
    return stream.getvalue()


PICKLE = pickle.dumps([1], 2)
GOOD = archive(PICKLE)


def _patched(content: bytes, at: int, value: bytes) -> bytes:
    at %= len(content)
    return content[:at] + value + content[at + len(value) :]


AMBIGUOUS = {
    "the same name twice": _raw(("a/data.pkl", PICKLE), ("a/data.pkl", pickle.dumps(2))),
    "the same name in capitals": _raw(("a/data.pkl", PICKLE), ("a/DATA.pkl", pickle.dumps(2))),
    "another folder": _raw(("a/data.pkl", PICKLE), ("b/version", b"3\n")),
    "another folder's pickle": _raw(("a/version", b"3\n"), ("b/data.pkl", PICKLE)),
    "TorchScript": _raw(("a/data.pkl", PICKLE), ("a/constants.pkl", PICKLE)),
    "code": _raw(("a/data.pkl", PICKLE), ("a/code/model.py", b"")),
    "a path that leads out": _raw(("a/data.pkl", PICKLE), ("a/data/../0", b"")),
    "compressed": _raw(("a/data.pkl", PICKLE), compress_type=zipfile.ZIP_DEFLATED),
    "no pickle": _raw(("a/version", b"3\n")),
    "empty": b"",
    "no archive": b"PK\3\4" + bytes(100),
    "bytes before it": b"x" * 64 + GOOD,
    "bytes after it": GOOD + b"x" * 64,
    "an archive after it": GOOD + GOOD,
    "another archive before it": archive(pickle.dumps(2)) + GOOD,
    "a comment": _patched(GOOD, -2, b"\x04\0") + b"abcd",
    "cut off": GOOD[:-1],
    "another name in front of the record": GOOD.replace(
        b"archive/data.pkl", b"archive/data.pkk", 1
    ),
    "another size in front of the record": _patched(GOOD, 22, struct.pack("<I", len(PICKLE) + 1)),
    "a folder": _raw(("a/data.pkl", PICKLE), external_attr=0x10),
    "encrypted": _patched(GOOD, 6, b"\1"),
    "a gap": GOOD[:0] + _raw(("a/data.pkl", PICKLE), extra=b"\x01\0\4\0abcd"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_could_be_read_in_two_ways_is_refused(case):
    with pytest.raises(ArchiveError):
        in_memory(AMBIGUOUS[case])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive(PICKLE + b"more"), "4 bytes follow its end"),
        (archive(PICKLE + pickle.dumps(2)), "bytes follow its end"),
        (archive(pickle.dumps(io.BytesIO)), "refers to"),
    ],
)
def test_the_pickle_of_an_archive_is_read_to_its_end(content, message):
    with pytest.raises(PickleError, match=message):
        in_memory(content).content(within(TENSORS))


def test_bytes_in_big_endian_order_are_refused():
    content = _raw(("a/data.pkl", PICKLE), ("a/byteorder", b"big"))
    with pytest.raises(ArchiveError, match="big-endian"):
        in_memory(content).content(within(TENSORS))


def test_a_storage_has_as_many_bytes_as_its_pickle_says():
    """torch would read what lies in memory after it."""
    content = saved(torch.zeros(4))
    short = zipfile.ZipFile(io.BytesIO(content)).read("archive/data.pkl")
    for data, is_right in (
        (bytes(16), True),
        (bytes(12), False),
        (bytes(20), False),
        (None, False),
    ):
        found = in_memory(archive(short, data))
        if is_right:
            found.content(within(TENSORS))
        else:
            with pytest.raises(PickleError, match="FloatStorage 0 of 4 elements is not there"):
                found.content(within(TENSORS))


@pytest.mark.parametrize("shape", ["(5,), (1,)", "(2,), (9,)", "(1,) * 100_000, (1,) * 100_000"])
def test_a_tensor_lies_within_its_storage(shape):
    sizes, strides = eval(shape)
    tensor = _Rebuilt(sizes, strides)
    stream = io.BytesIO()
    torch.save(tensor, stream)
    with pytest.raises(PickleError, match=r"lies within its storage|sizes and strides"):
        in_memory(stream.getvalue()).content(within(TENSORS))


class _Rebuilt:
    def __init__(self, sizes: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self._sizes, self._strides = sizes, strides

    def __reduce__(self):
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.zeros(4).untyped_storage(), dtype=torch.float32, _internal=True
        )
        arguments = (storage, 0, self._sizes, self._strides, False, {})
        return torch._utils._rebuild_tensor_v2, arguments


def test_a_damaged_pickle_is_named():
    content = saved([1, 2, 3])
    at = in_memory(content).records["data.pkl"].offset
    with pytest.raises(ArchiveError, match=r"damaged: the checksum of data\.pkl is"):
        in_memory(_patched(content, at + 4, b"\xee")).content(within(OBJECTS))
