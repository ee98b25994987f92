"""Pickles and archives of torch, written and read without importing torch or running anything.

A torch_dist checkpoint holds both: `.metadata` is a pickle of records whose classes torch defines, and
each entry of a `.distcp` file is the archive that torch.save writes, a zip file with a pickle and the
raw bytes of a tensor. Importing torch would cost more time than converting a small model, and more
memory than converting any.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Any

from checkpoint_conversion.dtypes import DTYPES, DType
from checkpoint_conversion.stored_archive import StoredArchive

_STORAGES = {"FloatStorage": "F32", "BFloat16Storage": "BF16", "HalfStorage": "F16"}
_STORAGE_OF = {dtype: storage for storage, dtype in _STORAGES.items()}


@dataclass(frozen=True)
class Named:
    """A class or function of another package; only its name is known."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """What a function gives for arguments."""

    function: Named
    arguments: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Instance:
    """An instance of a class, made without its constructor and then given a state. May be a key."""

    cls: Named
    state: Any


@dataclass(frozen=True)
class PersistentId:
    """A reference to something that is stored beside the pickle."""

    identity: Any


def dumps(value: Any) -> bytes:
    """A pickle (protocol 2) of plain values and of the classes above."""
    writer = _Writer()
    writer.write(value)
    return bytes(writer.out + b".")


@dataclass
class _Writer:
    """Emits pickle opcodes (see the standard library's pickletools). Texts and names that come again
    are referred to."""

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


class Unpickler(pickle.Unpickler):
    """Reads a pickle in which every class and function is a stand-in.

    Args:
        stream: The pickle.
        stand_in: Gives what stands for a class or function, by module and name.
    """

    def __init__(self, stream: IO[bytes], stand_in: Callable[[str, str], Any]) -> None:
        super().__init__(stream)
        self._stand_in = stand_in

    def find_class(self, module: str, name: str) -> Any:
        return self._stand_in(module, name)

    def persistent_load(self, identity: Any) -> Any:
        return PersistentId(identity)


class Inert:
    """Stands for an instance of any class, and keeps its state.

    Whatever a pickle does with it (construct, call, fill) has no effect.
    """

    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, *_: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass

    def add(self, _: Any) -> None:
        pass


def write_archive(
    append: Callable[[bytes | memoryview], None],
    content: bytes,
    data: Iterable[memoryview] | None = None,
) -> None:
    """Append what torch.save writes: an archive with a pickle, and the bytes of a tensor if any.

    Checksums are those of the content, for readers that compare them (torch does not).

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
    """The pickle in the archive of a contiguous tensor."""
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
    """Strides, in elements, of a tensor whose last axis runs fastest."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))[: len(shape)]


@dataclass(frozen=True)
class StoredTensor:
    """Where an archive keeps a tensor.

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


def read_pickle(stream: IO[bytes]) -> bytes:
    """The pickle of an archive.

    Raises:
        zipfile.BadZipFile, KeyError, OSError: When it is no such archive.
    """
    with zipfile.ZipFile(stream) as archive:
        return archive.read(_record(archive, "data.pkl"))


def locate_tensor(stream: IO[bytes]) -> StoredTensor:
    """Where the tensor of an archive lies; its data are not read.

    Raises:
        zipfile.BadZipFile, pickle.UnpicklingError, ValueError, KeyError: When the archive holds
            something else than a dense tensor of a known dtype.
    """
    with zipfile.ZipFile(stream) as archive:
        return _located(stream, archive, _content(archive))


def locate_tensors(stream: IO[bytes]) -> dict[str, StoredTensor]:
    """Where the tensors of a state dict lie, by name; raises like `locate_tensor`."""
    with zipfile.ZipFile(stream) as archive:
        content = _content(archive)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return {name: _located(stream, archive, value) for name, value in content.items()}


def _content(archive: zipfile.ZipFile) -> Any:
    has_order = any(info.filename.endswith("/byteorder") for info in archive.infolist())
    if has_order and archive.read(_record(archive, "byteorder")) != b"little":
        raise ValueError("its bytes are in big-endian order")
    return Unpickler(io.BytesIO(archive.read(_record(archive, "data.pkl"))), _tensor_part).load()


def _located(stream: IO[bytes], archive: zipfile.ZipFile, value: Any) -> StoredTensor:
    if isinstance(value, Call) and value.function.name == "_rebuild_parameter":
        value = value.arguments[0]
    if not isinstance(value, Call) or value.function.name != "_rebuild_tensor_v2":
        raise ValueError(f"it holds {value!r}, no dense tensor"[:200])
    storage, first, shape, strides = value.arguments[:4]
    _, dtype, key, *_ = storage.identity
    if not isinstance(dtype, DType):
        raise ValueError(f"it holds a {dtype!r}; supported: {', '.join(_STORAGES)}")
    info = _record(archive, f"data/{key}")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its data are compressed")
    stream.seek(info.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", stream.read(4))
    offset = info.header_offset + 30 + name_length + extra_length
    return StoredTensor(
        dtype, tuple(shape), tuple(strides), first, offset, info.file_size, info.CRC
    )


def _record(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    found = [info for info in archive.infolist() if info.filename.split("/", 1)[-1] == name]
    if len(found) != 1:
        raise KeyError(f"{len(found)} records {name}")
    # torch.serialization.set_crc32_options(False) leaves 0; zipfile checks nothing where it is None.
    found[0].CRC = found[0].CRC or None  # type: ignore[assignment]
    return found[0]


def _tensor_part(module: str, name: str) -> Any:
    if module == "torch" and name in _STORAGES:
        return DTYPES[_STORAGES[name]]
    if (module, name) == ("collections", "OrderedDict"):
        return dict
    return _Function(Named(module, name))


@dataclass(frozen=True)
class _Function:
    """Stands for a function of a pickle, and remembers what it is called with."""

    name: Named

    def __call__(self, *arguments: Any) -> Call:
        return Call(self.name, arguments)
