"""Checks that a torch_dist checkpoint is as it was written, and that loading it runs no code.

torch stores a checksum with everything that it writes, and never compares it again. These checks do.
Files without a checksum inside, for example `.metadata`, have one in `checksums.json`. Several
processes can share the work. All content is also vetted: an entry must be the archive of a tensor, or
of objects that are on a list (`pickles.uses`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_conversion.engine.raw_files import OpenFiles
from checkpoint_conversion.engine.regular_files import read_regular
from checkpoint_conversion.engine.workers import run_all
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.pickles.archive import Archive, read_archive
from checkpoint_conversion.pickles.reader import read_pickle
from checkpoint_conversion.pickles.uses import EXTRA_STATE, OBJECTS, TENSORS, within
from checkpoint_conversion.pickles.values import Call, Instance, Named
from checkpoint_conversion.torch_dist.checksum_list import check_listed
from checkpoint_conversion.torch_dist.metadata import Place, SavedTensor, check_files, read_metadata
from checkpoint_conversion.torch_dist.reader import COMMON_ENTRY, COMMON_FILE, open_entry

_EXTRA_STATE = "_extra_state"
# A larger common.pt is refused; it holds no tensors of the model.
_MOST_COMMON = 1 << 30
# The storage in which torch keeps a tensor, by its dtype; other dtypes have an untyped storage.
_STORAGE_OF = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


@dataclass(frozen=True)
class Entry:
    """An entry of a checkpoint.

    Attributes:
        tensor: The tensor of which it is a chunk; None for objects.
        sizes: The shape of the chunk.
    """

    key: str
    place: Place
    tensor: SavedTensor | None = None
    sizes: tuple[int, ...] = ()


def check_present(folder: Path) -> None:
    """Check that the files of a checkpoint are there and long enough. Only `.metadata` is read.

    Raises:
        ConversionError: The folder is not a torch_dist checkpoint, or a part of it is missing.
    """
    _present_entries(folder)


def check_whole(folder: Path) -> None:
    """Check that a checkpoint, the optimizer included, is there in full, and that its objects are harmless.

    The tensors are not read.

    Raises:
        ConversionError: The folder is not a torch_dist checkpoint, or a part of it is missing, damaged
            or refused.
    """
    check_listed(folder)
    entries = _present_entries(folder)
    with OpenFiles() as files:
        for entry in entries:
            if entry.tensor is None:
                vet_entry(files, entry.place, entry.key)
    if has_common_file(folder):
        read_vetted_common_file(folder)
    elif not any(entry.key == COMMON_ENTRY for entry in entries):
        raise ConversionError(f"{folder}: neither {COMMON_ENTRY} nor {COMMON_FILE} is there")


def check_content(
    folder: Path,
    number: int = 0,
    of: int = 1,
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Compare the checksums of a checkpoint, or of one share of it, with its bytes.

    Args:
        folder: A checkpoint that `check_whole` has accepted.
        number: The share, from 0 on.
        of: Number of shares; together they are the whole checkpoint.
        threads: Threads that read.
        progress: Called with the bytes of each entry, by several threads.

    Raises:
        ConversionError: Names the file, the entry and the fault.
    """

    def check(entry: Entry) -> None:
        _check_entry(files, entry)
        progress(entry.place.length)

    entries = sorted(_entries(folder), key=lambda entry: entry.place)
    with OpenFiles() as files:
        run_all(check, _share(entries, number, of), threads)


def size_of(folder: Path) -> int:
    """Return the bytes of all entries of a checkpoint.

    Raises:
        ConversionError: Its `.metadata` cannot be read.
    """
    return sum(entry.place.length for entry in _entries(folder))


def vet_entry(
    files: OpenFiles, place: Place, key: str, *, is_tensor: bool = False
) -> tuple[Archive, Any]:
    """Check that an entry is an archive that torch can load without running any code.

    Returns:
        The archive, and the value of its pickle.

    Raises:
        ConversionError: Names the file, the entry and the reason.
    """
    try:
        archive = open_entry(files, place, key)
        content = archive.content(within(TENSORS if is_tensor else OBJECTS))
        if is_tensor:
            _tensor_in(content)
        elif _EXTRA_STATE in key:
            _vet_extra_states(archive, content)
        return archive, content
    except ValueError as error:
        raise ConversionError(f"{place.file}: {key} cannot be loaded: {error}") from error


def has_common_file(folder: Path) -> bool:
    """Return whether a checkpoint has a common.pt, or anything else with this name."""
    file = folder / COMMON_FILE
    return file.exists() or file.is_symlink()


def read_vetted_common_file(folder: Path) -> bytes:
    """Return the bytes of a common.pt that torch can load without running any code.

    Raises like `vet_entry`.
    """
    file = folder / COMMON_FILE
    try:
        content = read_regular(file, _MOST_COMMON)
        archive = _in_memory(content)
        archive.content(within(OBJECTS))
        for record in archive.records.values():
            archive.check(record)
        return content
    except OSError as error:
        raise ConversionError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ConversionError(f"{file}: it cannot be loaded: {error}") from error


def _in_memory(content: bytes) -> Archive:
    return read_archive(lambda start, count: content[start : start + count], len(content))


def _vet_extra_states(archive: Archive, content: Any) -> None:
    """Vet the tensors of bytes, and version 1's streams, that Transformer Engine unpickles by itself."""
    for item in content if isinstance(content, list) else [content]:
        if isinstance(item, Call):
            _vet_bytes(archive, item)
        elif isinstance(item, Instance) and item.cls == Named("_io", "BytesIO"):
            stream, *_ = item.state
            if not isinstance(stream, bytes):
                raise ValueError("it holds a broken stream")
            _in_memory(stream).content(within(OBJECTS))
        elif item is not None:
            raise ValueError(f"it holds a {type(item).__name__}")


def _vet_bytes(archive: Archive, tensor: Call) -> None:
    """Vet the pickle in a tensor of bytes; an empty one has none."""
    storage, first, shape, strides, *_ = _tensor_in(tensor)
    if 0 in shape:
        return
    _, kind, key, *_ = storage.identity
    if kind != Named("torch", "ByteStorage") or len(shape) != 1 or strides != (1,):
        raise ValueError("it holds a tensor of other values than bytes in a row")
    data = archive.read(archive.records[f"data/{key}"].offset + first, shape[0])
    read_pickle(bytes(data), within(EXTRA_STATE))


def _tensor_in(content: Any) -> tuple[Any, ...]:
    """Return the arguments that a tensor is made of: storage, first element, shape, strides and so on."""
    is_parameter = isinstance(content, Call) and content.function.name == "_rebuild_parameter"
    tensor = content.arguments[0] if is_parameter else content
    if not isinstance(tensor, Call) or not tensor.function.name.startswith("_rebuild_tensor"):
        raise ValueError("it is no tensor")
    return tensor.arguments


def _entries(folder: Path) -> list[Entry]:
    metadata = read_metadata(folder)
    objects = [Entry(key, place) for key, place in metadata.objects.items()]
    return objects + [
        Entry(key, chunk.place, tensor, chunk.sizes)
        for key, tensor in metadata.tensors.items()
        for chunk in tensor.chunks
    ]


def _share(entries: Iterable[Entry], number: int, of: int) -> Iterator[Entry]:
    """Yield the entries that begin in the `number`-th part of all bytes, in the order of the files."""
    entries = list(entries)
    total, before = sum(entry.place.length for entry in entries), 0
    for entry in entries:
        if before * of // max(total, 1) == number:
            yield entry
        before += entry.place.length


def _present_entries(folder: Path) -> list[Entry]:
    entries = _entries(folder)
    ends: dict[Path, int] = {}
    for entry in entries:
        ends[entry.place.file] = max(ends.get(entry.place.file, 0), entry.place.end)
    check_files(ends.items(), "a part of the checkpoint")
    return entries


def _check_entry(files: OpenFiles, entry: Entry) -> None:
    """Compare all checksums of an entry, and compare a tensor with its description in `.metadata`."""
    is_tensor = entry.tensor is not None
    archive, content = vet_entry(files, entry.place, entry.key, is_tensor=is_tensor)
    try:
        if entry.tensor is not None:
            _check_tensor(content, entry.tensor.dtype, entry.sizes)
        for record in archive.records.values():
            archive.check(record)
    except ValueError as error:
        raise ConversionError(f"{entry.place.file}: {entry.key} is {error}") from error


def _check_tensor(content: Any, dtype: str, sizes: tuple[int, ...]) -> None:
    storage, _, shape, *_ = _tensor_in(content)
    kind = storage.identity[1].name
    if shape != sizes or kind != _STORAGE_OF.get(dtype, kind):
        raise ValueError(f"a {kind} {list(shape)}, but .metadata says {dtype} {list(sizes)}")
