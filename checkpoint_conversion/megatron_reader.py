"""Reading the model tensors of a torch_dist checkpoint, whatever chunks a training run saved.

Nothing of torch is imported and no code of the pickles runs (see `torch_pickle`). Of a saved chunk only
the bytes that are asked for are read, at their place in the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import pickle
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint_conversion.checksums import PartialChecksums
from checkpoint_conversion.chunks import TRANSFER_BYTES, Chunk, chunks_of
from checkpoint_conversion.dtypes import TORCH_DTYPES, DType
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import TensorRule
from checkpoint_conversion.families.family import Shape
from checkpoint_conversion.hf_folder import read_json_object
from checkpoint_conversion.megatron_writer import RELEASE, TRACKER
from checkpoint_conversion.raw_files import OpenFiles
from checkpoint_conversion.torch_pickle import (
    Inert,
    StoredTensor,
    Unpickler,
    contiguous_strides,
    locate_tensor,
)

# Where Megatron-Core keeps what is not sharded: in an entry, and in a file before 0.19
# (megatron/core/dist_checkpointing/serialization.py, load_common_state_dict).
COMMON_ENTRY = "common_state/shard_0_1"
COMMON_FILE = "common.pt"
# Keys of tensors beside the model: optimizer state, also of chained optimizers.
_OPTIMIZER = re.compile(r"(chained_\d+\.)*optimizer\b")

_METADATA_CLASSES = {
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
}


@dataclass(frozen=True)
class _Saved:
    """A chunk of a tensor as it was saved, and where its entry lies.

    Attributes:
        offsets, sizes: Its extent in the Megatron tensor.
        start, length: The entry in the file.
    """

    offsets: Shape
    sizes: Shape
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor as it was saved."""

    dtype: str
    shape: Shape
    chunks: tuple[_Saved, ...]


@dataclass(frozen=True)
class _Metadata:
    """The content of `.metadata`: tensors by key, and (file, start, length) of other entries."""

    tensors: Mapping[str, _Tensor]
    objects: Mapping[str, tuple[Path, int, int]]


@dataclass(frozen=True)
class MegatronCheckpoint:
    """One torch_dist checkpoint of a model of a known family.

    Attributes:
        folder: The folder of the iteration, or `release`.
        rules: The name table, with the names that the checkpoint has.
        dtypes: The dtype of each model tensor, by key.
        padding: Rows that pad the vocabulary; they are not read.
    """

    folder: Path
    rules: tuple[TensorRule, ...]
    dtypes: Mapping[str, DType]
    padding: int
    _saved: Mapping[str, Mapping[Shape, list[_Saved]]]
    _located: dict[_Saved, StoredTensor] = field(default_factory=dict)
    _checksums: PartialChecksums[tuple[str, _Saved]] = field(default_factory=PartialChecksums)

    def chunks(self, rule: TensorRule) -> Iterator[Chunk]:
        """The chunks to read a tensor in."""
        return chunks_of(rule, self.dtypes[rule.megatron], TRANSFER_BYTES)

    def read_into(
        self,
        chunk: Chunk,
        dtype: DType,
        into: memoryview,
        files: OpenFiles | None = None,
        finite: bool = False,
    ) -> None:
        """Read the values of a chunk in a dtype, as bytes.

        Args:
            into: A buffer of the size of the chunk.
            files: Files that stay open for the next call.
            finite: Refuse NaN and infinity.

        Raises:
            ConversionError: When a file cannot be read, the saved chunks do not cover this one, or
                a value is outside the range of the dtype.
        """
        kind = self.dtypes[chunk.key]
        data = into
        if kind != dtype:
            data = memoryview(bytearray(chunk.elements * kind.itemsize))
        with contextlib.nullcontext(files) if files else OpenFiles() as files:
            self._assemble(chunk, kind, data, files)
        if finite or kind != dtype:
            from checkpoint_conversion.values import deliver  # needs numpy

            deliver(data, kind, into, dtype, f"{self.folder}: {chunk.key}", finite)

    def check_rest(self, files: OpenFiles) -> None:
        """Check the entries of which all but the rows that pad the vocabulary were read.

        Raises:
            ConversionError: When a checksum differs.
        """
        for key, saved in self._checksums.open_entries():
            stored = self._located[saved]
            for start, length in self._checksums.gaps((key, saved), stored.nbytes):
                data = memoryview(bytearray(length))
                files.read(saved.file, saved.start + stored.offset + start, data, key)
                self._check(key, saved, stored, start, data)

    def _assemble(self, chunk: Chunk, dtype: DType, data: memoryview, files: OpenFiles) -> None:
        """Put the overlapping parts of the saved chunks together; axis 0 is the rows, axis 1 (if
        any) the columns."""
        width = math.prod(chunk.rule.piece_shape[1:])
        row_bytes = width * dtype.itemsize
        stacked, missing = len(chunk.piece.index), chunk.elements
        for saved in self._saved[chunk.key].get(chunk.piece.index, ()):
            first, size = saved.offsets[stacked], saved.sizes[stacked]
            begin = max(first, chunk.start)
            end = min(first + size, chunk.start + chunk.rows)
            if begin >= end:
                continue
            columns = saved.sizes[stacked + 1] if len(saved.sizes) > stacked + 1 else 1
            index = [i - o for i, o in zip(chunk.piece.index, saved.offsets, strict=False)]
            source = (chunk.key, saved, dtype, (*index, begin - first), end - begin)
            rows = data[(begin - chunk.start) * row_bytes : (end - chunk.start) * row_bytes]
            if columns == width:
                self._read_rows(*source, rows, files)
            else:
                from checkpoint_conversion.values import put_columns  # needs numpy

                part = memoryview(bytearray((end - begin) * columns * dtype.itemsize))
                self._read_rows(*source, part, files)
                put_columns(part, rows, end - begin, saved.offsets[stacked + 1], dtype)
            missing -= (end - begin) * columns
        if missing:
            raise ConversionError(
                f"{self.folder}: the saved chunks of {chunk.key} do not cover "
                f"{list(chunk.sizes)} at {list(chunk.offsets)}"
            )

    def _read_rows(
        self,
        key: str,
        saved: _Saved,
        dtype: DType,
        index: tuple[int, ...],
        rows: int,
        into: memoryview,
        files: OpenFiles,
    ) -> None:
        """Read whole rows of a saved chunk from `index` on."""
        stored = self._locate(key, saved, dtype, files)
        place = saved.start + stored.offset
        steps = stored.strides[: len(index)]
        first = stored.first + sum(i * step for i, step in zip(index, steps, strict=True))
        if stored.strides == contiguous_strides(stored.shape):
            files.read(saved.file, place + first * dtype.itemsize, into, key)
            self._check(key, saved, stored, first * dtype.itemsize, into)
            return
        # A transposed tensor, say; never seen in a Megatron checkpoint.
        from checkpoint_conversion.values import put_strided  # needs numpy

        storage = memoryview(bytearray(stored.nbytes))
        files.read(saved.file, place, storage, key)
        self._check(key, saved, stored, 0, storage)
        column = stored.strides[len(index)] if len(stored.strides) > len(index) else 1
        put_strided(storage, first, (steps[-1], column), into, rows, dtype)

    def _check(
        self, key: str, saved: _Saved, stored: StoredTensor, start: int, data: memoryview
    ) -> None:
        """Compare the checksum of an entry once all of its bytes were read."""
        if stored.checksum is None:
            return
        found = self._checksums.add((key, saved), start, data, stored.nbytes)
        if found not in (None, stored.checksum):
            raise ConversionError(
                f"{saved.file}: {key} is corrupt: the checksum of its bytes is {found:08x}, that in the "
                f"file {stored.checksum:08x}; copy the checkpoint again, or take another one"
            )

    def _locate(self, key: str, saved: _Saved, dtype: DType, files: OpenFiles) -> StoredTensor:
        if saved in self._located:
            return self._located[saved]
        window = _Window(files, saved.file, saved.start, saved.length, key)
        try:
            stored = locate_tensor(io.BufferedReader(window))
        except ConversionError:
            raise
        except Exception as error:  # a broken archive can raise almost anything
            raise ConversionError(f"{saved.file}: cannot read {key}: {error}") from error
        count = 1 + sum((n - 1) * s for n, s in zip(stored.shape, stored.strides, strict=True))
        enough = (stored.first + count) * dtype.itemsize <= stored.nbytes
        if stored.dtype != dtype or stored.shape != saved.sizes or not enough:
            raise ConversionError(
                f"{saved.file}: cannot read {key}: its entry is {stored.dtype} "
                f"{list(stored.shape)}, but .metadata says {dtype} {list(saved.sizes)}"
            )
        self._located[saved] = stored
        return stored


def find_checkpoint(folder: str | Path, iteration: str | int | None = None) -> Path:
    """The folder of a checkpoint within what Megatron calls a save folder.

    Args:
        folder: A folder with latest_checkpointed_iteration.txt, or a checkpoint itself.
        iteration: A number or "release"; None for the latest.

    Raises:
        ConversionError: When there is no such checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder")
    if iteration is None and (folder / ".metadata").exists():
        return folder
    if iteration is None:
        iteration = _latest(folder)
    found = folder / _iteration_name(str(iteration))
    if not found.is_dir():
        there = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise ConversionError(f"{found}: no such checkpoint; there are: {', '.join(there) or '-'}")
    return found


def open_checkpoint(folder: Path, rules: Iterable[TensorRule]) -> MegatronCheckpoint:
    """Read the metadata of a checkpoint and check its model tensors; no tensor is read.

    Raises:
        ConversionError: When it is not a complete torch_dist checkpoint, or its model tensors are
            not those of the rules.
    """
    metadata = _read_metadata(folder)
    saved = {key: t for key, t in metadata.tensors.items() if not _OPTIMIZER.match(key)}
    named = tuple(found for rule in rules for found in _as_saved(rule, saved))
    dtypes = {
        rule.megatron: _checked_dtype(folder, rule, saved.get(rule.megatron)) for rule in named
    }
    known = {key for rule in named for key in rule.keys}
    for key, tensor in saved.items():
        if key not in known:
            raise ConversionError(
                f"{folder}: {key} {list(tensor.shape)} has no place in the HuggingFace model that "
                "config.json describes"
            )
    for key in dtypes:
        _check_files(((c.file, c.start + c.length) for c in saved[key].chunks), key)
    chunks = {rule.megatron: _by_piece(saved[rule.megatron], len(rule.stack)) for rule in named}
    for rule in named:
        for piece in chunks[rule.megatron].values():
            _check_disjoint(folder, rule.megatron, piece, len(rule.stack))
    vocabularies = [rule for rule in named if rule.vocabulary]
    padding = max(saved[r.megatron].shape[0] - r.megatron_shape[0] for r in vocabularies)
    return MegatronCheckpoint(folder, named, dtypes, padding, chunks)


def check_whole(folder: Path) -> None:
    """Check that all that a checkpoint consists of, the optimizer included, is there in full.

    The files are not read, except for `.metadata`.

    Raises:
        ConversionError: When it is not a torch_dist checkpoint, or a part of it is missing.
    """
    metadata = _read_metadata(folder)
    if COMMON_ENTRY not in metadata.objects and not (folder / COMMON_FILE).is_file():
        raise ConversionError(f"{folder}: neither {COMMON_ENTRY} nor {COMMON_FILE} is there")
    ends: dict[Path, int] = {}
    for tensor in metadata.tensors.values():
        for chunk in tensor.chunks:
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
    for file, start, length in metadata.objects.values():
        ends[file] = max(ends.get(file, 0), start + length)
    _check_files(ends.items(), "a part of the checkpoint")


def read_object(folder: Path, key: str) -> bytes | None:
    """The bytes of an entry that is not a tensor: what torch.save wrote; None without the entry.

    Raises:
        ConversionError: When the checkpoint is not a torch_dist checkpoint, or cannot be read.
    """
    entry = _read_metadata(folder).objects.get(key)
    if entry is None:
        return None
    file, start, length = entry
    _check_files([(file, start + length)], key)
    data = bytearray(length)
    with OpenFiles() as files:
        files.read(file, start, memoryview(data), key)
    return bytes(data)


def _latest(folder: Path) -> str:
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise ConversionError(
            f"{folder}: neither {TRACKER} nor .metadata; not a Megatron save folder"
        )
    return tracker.read_text(encoding="utf-8", errors="replace").strip()


def _iteration_name(iteration: str) -> str:
    if iteration == RELEASE:
        return RELEASE
    if not re.fullmatch(r"\d+", iteration):
        raise ConversionError(f"iteration {iteration!r} is neither a number nor '{RELEASE}'")
    return f"iter_{int(iteration):07d}"


def _as_saved(rule: TensorRule, saved: Container[str]) -> list[TensorRule]:
    """A rule under the name that a checkpoint has for it; several where it has one for each layer."""
    there = [key for key in rule.keys if key in saved]
    if there:
        return [dataclasses.replace(rule, megatron=there[0], aliases=tuple(there[1:]))]
    layers = rule.per_layer()
    if layers != (rule,) and any(key in saved for layer in layers for key in layer.keys):
        return [found for layer in layers for found in _as_saved(layer, saved)]
    return [rule.renamed(rule.megatron)]


def _checked_dtype(folder: Path, rule: TensorRule, saved: _Tensor | None) -> DType:
    """The dtype of a tensor whose shape and chunks are right; a vocabulary may be padded."""
    if saved is None:
        raise ConversionError(f"{folder}: no tensor {rule.megatron}, which config.json calls for")
    shape, expected = saved.shape, rule.megatron_shape
    padded = rule.vocabulary and len(shape) > 0 and shape[0] > expected[0]
    if shape != expected and not (padded and shape[1:] == expected[1:]):
        raise ConversionError(
            f"{folder}: {rule.megatron} has shape {list(shape)}; config.json calls for "
            f"{list(expected)}"
        )
    if saved.dtype not in TORCH_DTYPES:
        raise ConversionError(
            f"{folder}: {rule.megatron} is {saved.dtype}; supported: {', '.join(TORCH_DTYPES)}"
        )
    if sum(math.prod(chunk.sizes) for chunk in saved.chunks) != math.prod(shape):
        raise ConversionError(f"{folder}: the chunks of {rule.megatron} do not cover it")
    return TORCH_DTYPES[saved.dtype]


def _by_piece(tensor: _Tensor, stacked: int) -> dict[Shape, list[_Saved]]:
    """The saved chunks that hold something of each piece; a chunk may span several layers."""
    found: dict[Shape, list[_Saved]] = {}
    for chunk in tensor.chunks:
        spans = zip(chunk.offsets[:stacked], chunk.sizes[:stacked], strict=True)
        for index in itertools.product(*(range(first, first + size) for first, size in spans)):
            found.setdefault(index, []).append(chunk)
    return found


def _check_disjoint(folder: Path, key: str, chunks: Iterable[_Saved], stacked: int) -> None:
    """Check that nothing of a piece is stored twice: something else would be missing then."""
    spans = sorted(
        [(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True)][stacked:]
        for chunk in chunks
    )
    for number, one in enumerate(spans):
        for other in spans[number + 1 :]:
            if other[0][0] >= one[0][1]:
                break  # nor do those that follow begin before this one ends
            if all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, other, strict=True)):
                raise ConversionError(
                    f"{folder}: two chunks of {key} hold the same rows, from {one[0][0]} and from "
                    f"{other[0][0]} on"
                )


def _check_files(ends: Iterable[tuple[Path, int]], key: str) -> None:
    """Check that all that is stored of an entry lies within its files."""
    sizes: dict[Path, int] = {}
    for file, end in ends:
        if file not in sizes:
            if not file.is_file():
                raise ConversionError(f"{file}: missing; {key} is in it")
            sizes[file] = file.stat().st_size
        if end > sizes[file]:
            raise ConversionError(f"{file}: truncated; {key} does not end in it")


class _Window(io.RawIOBase):
    """A part of a file as a stream of its own."""

    def __init__(self, files: OpenFiles, file: Path, start: int, length: int, what: str) -> None:
        self._files, self._file, self._what = files, file, what
        self._start, self._length, self._at = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        if self._at < 0:
            raise OSError(f"seek to {self._at}")
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        into = memoryview(buffer).cast("B")[:count]
        self._files.read(self._file, self._start + self._at, into, self._what)
        self._at += count
        return count


def _read_metadata(folder: Path) -> _Metadata:
    """The content of `.metadata`, which is a pickle; no code that it refers to is run."""
    backend = read_json_object(folder / "metadata.json").get("sharded_backend")
    if backend != "torch_dist":
        raise ConversionError(f"{folder}: checkpoint format {backend!r}; supported is 'torch_dist'")
    file = folder / ".metadata"
    try:
        with file.open("rb") as stream:
            content = Unpickler(stream, _stand_in).load()
        return _plain(folder, content.state)
    except ConversionError:
        raise
    except FileNotFoundError:
        raise ConversionError(f"{file}: missing; the checkpoint is not complete") from None
    except Exception as error:  # a broken pickle can raise almost anything
        raise ConversionError(f"{file}: not readable: {error}") from error


def _plain(folder: Path, state: Mapping[str, Any]) -> _Metadata:
    """The records of the pickle, without what is not needed."""
    places = {}
    for index, info in state["storage_data"].items():
        name = info.state["relative_path"]
        if Path(name).name != name:
            raise ConversionError(f"{folder / '.metadata'}: it refers to {name!r}, another folder")
        if info.state.get("transform_descriptors"):
            raise ConversionError(f"{folder / name}: {index.state['fqn']} is compressed or encoded")
        place = (folder / name, info.state["offset"], info.state["length"])
        places[index.state["fqn"], index.state.get("offset")] = place
    tensors, objects = {}, {}
    for key, entry in state["state_dict_metadata"].items():
        if isinstance(entry, _TensorRecord):
            tensors[key] = _tensor(key, entry.state, places)
        elif (key, None) in places:
            objects[key] = places[key, None]
    return _Metadata(tensors, objects)


def _tensor(
    key: str, state: Mapping[str, Any], places: Mapping[tuple[str, Any], tuple[Path, int, int]]
) -> _Tensor:
    chunks = []
    for chunk in state["chunks"]:
        offsets, sizes = chunk.state["offsets"], chunk.state["sizes"]
        chunks.append(_Saved(offsets, sizes, *places[key, offsets]))
    return _Tensor(state["properties"].state[0], state["size"], tuple(chunks))


class _TensorRecord(Inert):
    """The metadata of a tensor; that of anything else is an `Inert`."""


def _stand_in(module: str, name: str) -> Any:
    """What stands for the classes of checkpoint metadata; Megatron's own are plain records."""
    if (module, name) == ("torch", "Size"):
        return tuple
    if module == "torch" and re.fullmatch(r"(bfloat|float|complex|uint|int|bool)\w*", name):
        return name  # a dtype
    if name in _METADATA_CLASSES.get(module, ()):
        return _TensorRecord if name == "TensorStorageMetadata" else Inert
    if module.split(".")[0] == "megatron":
        return Inert
    raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is no metadata")
