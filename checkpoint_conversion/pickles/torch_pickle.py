"""Pickles and archives of torch, written and read without importing torch or running their code.

A torch_dist checkpoint holds both. `.metadata` is a pickle of records whose classes torch defines. Each
entry of a `.distcp` file is the archive that torch.save writes: a zip file with a pickle and the raw
bytes of a tensor. Importing torch would cost more time than converting a small model, and more memory
than converting any.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from checkpoint_conversion.engine.dtypes import DTYPES, DType
from checkpoint_conversion.pickles.archive import Archive
from checkpoint_conversion.pickles.stored_archive import StoredArchive
from checkpoint_conversion.pickles.uses import TENSORS, within
from checkpoint_conversion.pickles.values import Call, Instance, Named, PersistentId

_STORAGES = {"FloatStorage": "F32", "BFloat16Storage": "BF16", "HalfStorage": "F16"}
_STORAGE_OF = {dtype: storage for storage, dtype in _STORAGES.items()}


def dumps(value: Any) -> bytes:
    """Return a pickle (protocol 2) of plain values and of the classes above."""
    writer = _Writer()
    writer.write(value)
    return bytes(writer.out + b".")


@dataclass
class _Writer:
    """Emitter of pickle opcodes (see the standard library's pickletools).

    A text or name that comes again is written as a reference to the first one.
    """

    out: bytearray = field(default_factory=lambda: bytearray(b"\x80\x02"))
    memo: dict[Any, int] = field(default_factory=dict)

    def write(self, value: Any) -> None:
        out = self.out
        if value is None or isinstance(value, bool):
            out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            if -(2**31) <= value < 2**31:
                out += b"J" + struct.pack("<i", value)
            else:
                digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
                out += b"\x8a" + bytes([len(digits)]) + digits
        elif isinstance(value, str):
            text = value.encode()
            self._once(value, b"X" + struct.pack("<I", len(text)) + text)
        elif isinstance(value, Named):
            self._once(value, f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, tuple):
            self._marked(value, b"(", b"t")
        elif isinstance(value, list):
            self._marked(value, b"](", b"e")
        elif isinstance(value, dict):
            self._marked([part for item in value.items() for part in item], b"}(", b"u")
        elif isinstance(value, Call):
            self._each(value.function, value.arguments, b"R")
        elif isinstance(value, Instance):
            self._each(value.cls, (), b"\x81")
            self._each(value.state, b"b")
        elif isinstance(value, PersistentId):
            self._each(value.identity, b"Q")
        else:
            raise TypeError(f"no pickle of {type(value).__name__}")

    def _each(self, *parts: Any) -> None:
        *values, opcode = parts
        for value in values:
            self.write(value)
        self.out += opcode

    def _marked(self, values: Any, begin: bytes, end: bytes) -> None:
        self.out += begin
        for value in values:
            self.write(value)
        self.out += end

    def _once(self, value: Any, opcodes: bytes) -> None:
        if value in self.memo:
            self.out += b"j" + struct.pack("<I", self.memo[value])
        else:
            self.out += opcodes + b"r" + struct.pack("<I", len(self.memo))
            self.memo[value] = len(self.memo)


def write_archive(
    append: Callable[[bytes | memoryview], None],
    content: bytes,
    data: Iterable[memoryview] | None = None,
) -> None:
    """Append an archive as torch.save writes it: a pickle, and the bytes of a tensor if any.

    Checksums cover the content, for readers that compare them (torch does not).

    Args:
        append: Writes at the end of a file.
        content: The pickle.
        data: The bytes, part by part.
    """
    archive = StoredArchive(append)
    archive.add("archive/data.pkl", [content])
    archive.add("archive/byteorder", [b"little"])
    archive.add("archive/version", [b"3\n"])
    if data is not None:
        archive.add("archive/data/0", data)
    archive.close()


def tensor_pickle(dtype: DType, shape: tuple[int, ...]) -> bytes:
    """Return the pickle in the archive of a contiguous tensor."""
    strides = contiguous_strides(shape)
    elements = strides[0] * shape[0] if shape else 1
    storage = Named("torch", _STORAGE_OF[dtype.name])
    return dumps(
        Call(
            Named("torch._utils", "_rebuild_tensor_v2"),
            (
                PersistentId(("storage", storage, "0", "cpu", elements)),
                0,
                shape,
                strides,
                False,
                Call(Named("collections", "OrderedDict"), ()),
            ),
        )
    )


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a tensor whose last axis runs fastest."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))[: len(shape)]


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor in an archive.

    Attributes:
        offset: First byte of the tensor's storage in the archive.
        nbytes: Bytes of the storage.
        first: The tensor's first element in the storage.
        strides: In elements.
        checksum: CRC-32 of the storage; None where torch was told to make none.
    """

    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int
    offset: int
    nbytes: int
    checksum: int | None


def locate_tensor(archive: Archive) -> StoredTensor:
    """Find the tensor of an archive; its data are not read.

    Raises:
        ValueError: The archive holds something else than a dense tensor of a known dtype.
    """
    return _located(archive, archive.content(within(TENSORS)))


def locate_tensors(archive: Archive) -> dict[str, StoredTensor]:
    """Find the tensors of a state dict, by name; raises like `locate_tensor`."""
    content = archive.content(within(TENSORS))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    for name in content:
        if not isinstance(name, str):
            raise ValueError(f"it holds a {type(name).__name__} for a name")
    return {name: _located(archive, value) for name, value in content.items()}


def _located(archive: Archive, value: Any) -> StoredTensor:
    if isinstance(value, Call) and value.function.name == "_rebuild_parameter":
        value = value.arguments[0]
    if not isinstance(value, Call):
        raise ValueError(f"it holds a {type(value).__name__}, no dense tensor")
    storage, first, shape, strides = value.arguments[:4]
    _, kind, key, *_ = storage.identity
    if kind.name not in _STORAGES:
        raise ValueError(f"it holds a {kind.name}; supported: {', '.join(_STORAGES)}")
    record = archive.records[f"data/{key}"]
    dtype = DTYPES[_STORAGES[kind.name]]
    return StoredTensor(dtype, shape, strides, first, record.offset, record.nbytes, record.checksum)
