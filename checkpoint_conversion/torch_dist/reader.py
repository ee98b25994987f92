"""Reader of the model tensors of a torch_dist checkpoint, whatever chunks a training run saved.

It does not import torch, and no code of the pickles runs (see `pickles.torch_pickle`). Of a saved chunk
it reads only the bytes that are asked for, at their place in the file.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from checkpoint_conversion.engine.checksums import PartialChecksums
from checkpoint_conversion.engine.dtypes import TORCH_DTYPES, DType
from checkpoint_conversion.engine.raw_files import OpenFiles
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import TensorRule
from checkpoint_conversion.families.family import Shape
from checkpoint_conversion.hf.chunks import TRANSFER_BYTES, TensorChunk, chunks_of
from checkpoint_conversion.pickles.archive import Archive, read_archive
from checkpoint_conversion.pickles.torch_pickle import (
    StoredTensor,
    contiguous_strides,
    locate_tensor,
)
from checkpoint_conversion.pickles.values import Uses
from checkpoint_conversion.torch_dist.metadata import (
    Place,
    Saved,
    SavedTensor,
    check_files,
    read_metadata,
)

# Megatron-Core keeps its unsharded state in an entry, and before 0.19 in a file
# (megatron/core/dist_checkpointing/serialization.py, load_common_state_dict).
COMMON_ENTRY = "common_state/shard_0_1"
COMMON_FILE = "common.pt"
# Keys of tensors besides the model's: optimizer state, also of chained optimizers.
_OPTIMIZER = re.compile(r"(chained_\d+\.)*optimizer\b")
# Layers, experts and ranks of the largest models give some 100,000 parts of layers or experts.
_MOST_PARTS = 10_000_000
# Parts of one layer that begin in the same row: one for each rank that has some of its columns.
_MOST_SIDE_BY_SIDE = 512


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
    _saved: Mapping[str, Mapping[Shape, list[Saved]]]
    _located: dict[Saved, StoredTensor] = field(default_factory=dict)
    _checksums: PartialChecksums[tuple[str, Saved]] = field(default_factory=PartialChecksums)

    def chunks(self, rule: TensorRule) -> Iterator[TensorChunk]:
        """Return the chunks in which to read a tensor."""
        return chunks_of(rule, self.dtypes[rule.megatron], TRANSFER_BYTES)

    def read_into(
        self,
        chunk: TensorChunk,
        dtype: DType,
        into: memoryview,
        files: OpenFiles,
        finite: bool = False,
    ) -> None:
        """Read the values of a chunk in a dtype, as bytes.

        Args:
            into: A buffer of the size of the chunk.
            files: Open files, which stay open for the next call.
            finite: Refuse NaN and infinity.

        Raises:
            ConversionError: When a file cannot be read, the saved chunks do not cover this one, or a
                value is outside the range of the dtype.
        """
        kind = self.dtypes[chunk.key]
        data = into
        if kind != dtype:
            data = memoryview(bytearray(chunk.elements * kind.itemsize))
        self._assemble(chunk, kind, data, files)
        if finite or kind != dtype:
            from checkpoint_conversion.engine.values import deliver  # needs numpy

            deliver(data, kind, into, dtype, f"{self.folder}: {chunk.key}", finite)

    def check_rest(self, files: OpenFiles) -> None:
        """Check the entries that were read except for the rows that pad the vocabulary.

        Raises:
            ConversionError: When a checksum differs.
        """
        for key, saved in self._checksums.open_entries():
            stored = self._located[saved]
            for start, length in self._checksums.gaps((key, saved), stored.nbytes):
                data = memoryview(bytearray(length))
                files.read(saved.place.file, saved.place.start + stored.offset + start, data, key)
                self._check(key, saved, stored, start, data)

    def _assemble(
        self, chunk: TensorChunk, dtype: DType, data: memoryview, files: OpenFiles
    ) -> None:
        """Assemble the overlapping parts of the saved chunks.

        Axis 0 is the rows, and the others, if any, are the columns. Only the columns of a matrix are in
        several chunks.
        """
        width = math.prod(chunk.rule.piece_shape[1:])
        row_bytes = width * dtype.itemsize
        stacked, missing = len(chunk.piece.index), chunk.elements
        for saved in self._saved[chunk.key].get(chunk.piece.index, ()):
            first, size = saved.offsets[stacked], saved.sizes[stacked]
            begin = max(first, chunk.start)
            end = min(first + size, chunk.start + chunk.rows)
            if begin >= end:
                continue
            columns = math.prod(saved.sizes[stacked + 1 :])
            index = [i - o for i, o in zip(chunk.piece.index, saved.offsets, strict=False)]
            source = (chunk.key, saved, dtype, (*index, begin - first), end - begin)
            rows = data[(begin - chunk.start) * row_bytes : (end - chunk.start) * row_bytes]
            if columns == width:
                self._read_rows(*source, rows, files)
            else:
                from checkpoint_conversion.engine.values import put_columns  # needs numpy

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
        saved: Saved,
        dtype: DType,
        index: tuple[int, ...],
        rows: int,
        into: memoryview,
        files: OpenFiles,
    ) -> None:
        """Read whole rows of a saved chunk from `index` on."""
        stored = self._locate(key, saved, dtype, files)
        place = saved.place.start + stored.offset
        steps = stored.strides[: len(index)]
        first = stored.first + sum(i * step for i, step in zip(index, steps, strict=True))
        if stored.strides == contiguous_strides(stored.shape):
            files.read(saved.place.file, place + first * dtype.itemsize, into, key)
            self._check(key, saved, stored, first * dtype.itemsize, into)
            return
        if len(stored.shape) > len(index) + 1:
            raise ConversionError(
                f"{saved.place.file}: {key} {list(stored.shape)} is not stored row by row"
            )
        # For example a transposed tensor; never seen in a Megatron checkpoint.
        from checkpoint_conversion.engine.values import put_strided  # needs numpy

        storage = memoryview(bytearray(stored.nbytes))
        files.read(saved.place.file, place, storage, key)
        self._check(key, saved, stored, 0, storage)
        column = stored.strides[len(index)] if len(stored.strides) > len(index) else 1
        put_strided(storage, first, (steps[-1], column), into, rows, dtype)

    def _check(
        self, key: str, saved: Saved, stored: StoredTensor, start: int, data: memoryview
    ) -> None:
        """Compare the checksum of an entry once all of its bytes were read."""
        if stored.checksum is None:
            return
        found = self._checksums.add((key, saved), start, data, stored.nbytes)
        if found not in (None, stored.checksum):
            raise ConversionError(
                f"{saved.place.file}: {key} is corrupt: the checksum of its bytes is {found:08x}, the file "
                f"says {stored.checksum:08x}; copy the checkpoint again, or take another one"
            )

    def _locate(self, key: str, saved: Saved, dtype: DType, files: OpenFiles) -> StoredTensor:
        if saved in self._located:
            return self._located[saved]
        try:
            stored = locate_tensor(open_entry(files, saved.place, key))
        except ValueError as error:
            raise ConversionError(f"{saved.place.file}: cannot read {key}: {error}") from error
        count = 1 + sum((n - 1) * s for n, s in zip(stored.shape, stored.strides, strict=True))
        enough = (stored.first + count) * dtype.itemsize <= stored.nbytes
        if stored.dtype != dtype or stored.shape != saved.sizes or not enough:
            raise ConversionError(
                f"{saved.place.file}: cannot read {key}: its entry is {stored.dtype} "
                f"{list(stored.shape)}, but .metadata says {dtype} {list(saved.sizes)}"
            )
        self._located[saved] = stored
        return stored


def open_checkpoint(folder: Path, rules: Iterable[TensorRule]) -> MegatronCheckpoint:
    """Read the metadata of a checkpoint and check its model tensors; no tensor is read.

    Raises:
        ConversionError: When the folder is not a complete torch_dist checkpoint, or its model tensors
            differ from the rules.
    """
    metadata = read_metadata(folder)
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
        check_files(((chunk.place.file, chunk.place.end) for chunk in saved[key].chunks), key)
    chunks = {rule.megatron: _by_piece(saved[rule.megatron], len(rule.stack)) for rule in named}
    for rule in named:
        for piece in chunks[rule.megatron].values():
            _check_disjoint(folder, rule.megatron, piece, len(rule.stack))
    vocabularies = [rule for rule in named if rule.vocabulary]
    excess = (saved[r.megatron].shape[0] - r.megatron_shape[0] for r in vocabularies)
    padding = max(excess, default=0)
    return MegatronCheckpoint(folder, named, dtypes, padding, chunks)


def read_object(folder: Path, key: str, uses: Uses) -> Any:
    """Return the value of an entry that is not a tensor; None without the entry.

    Args:
        uses: The classes and functions that its pickle may name.

    Raises:
        ConversionError: When the checkpoint is not a torch_dist checkpoint, or cannot be read.
    """
    place = read_metadata(folder).objects.get(key)
    if place is None:
        return None
    check_files([(place.file, place.end)], key)
    with OpenFiles() as files:
        try:
            return open_entry(files, place, key).content(uses)
        except ValueError as error:
            raise ConversionError(f"{place.file}: cannot read {key}: {error}") from error


def read_common_file(folder: Path, uses: Uses) -> Any:
    """Return the value of common.pt; raises like `read_object`."""
    file = folder / COMMON_FILE
    with OpenFiles() as files:
        try:
            place = Place(file, 0, file.stat().st_size)
            return open_entry(files, place, COMMON_FILE).content(uses)
        except OSError as error:
            raise ConversionError(f"{file}: {error.strerror}") from error
        except ValueError as error:
            raise ConversionError(f"{file}: cannot be read: {error}") from error


def open_entry(files: OpenFiles, place: Place, key: str) -> Archive:
    """Return an entry as an archive; only its structure is read.

    Raises:
        ValueError: The entry is not an archive, or is damaged.
        ConversionError: The file cannot be read.
    """
    return read_archive(partial(_read_entry, files, place, key), place.length)


def _read_entry(files: OpenFiles, place: Place, key: str, offset: int, count: int) -> bytearray:
    data = bytearray(max(0, min(count, place.length - offset)))
    files.read(place.file, place.start + offset, memoryview(data), key)
    return data


def _as_saved(rule: TensorRule, saved: Container[str]) -> list[TensorRule]:
    """Return a rule under the checkpoint's name for it; several if the checkpoint has one for each layer."""
    there = [key for key in rule.keys if key in saved]
    if there:
        return [dataclasses.replace(rule, megatron=there[0], aliases=tuple(there[1:]))]
    layers = rule.per_layer()
    if layers != (rule,) and any(key in saved for layer in layers for key in layer.keys):
        return [found for layer in layers for found in _as_saved(layer, saved)]
    return [rule.renamed(rule.megatron)]


def _checked_dtype(folder: Path, rule: TensorRule, saved: SavedTensor | None) -> DType:
    """Return the dtype of a tensor, after a check of its shape and chunks; a vocabulary may be padded."""
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
    for chunk in saved.chunks:
        if any(o + n > size for o, n, size in zip(chunk.offsets, chunk.sizes, shape, strict=True)):
            raise ConversionError(f"{folder}: a chunk of {rule.megatron} lies outside of it")
    inner = len(rule.stack) + 1
    if len(shape) > inner + 1 and any(
        chunk.sizes[inner:] != shape[inner:] for chunk in saved.chunks
    ):
        raise ConversionError(
            f"{folder}: {rule.megatron} {list(shape)} is not cut by rows, as only matrices may be"
        )
    if sum(math.prod(chunk.sizes) for chunk in saved.chunks) != math.prod(shape):
        raise ConversionError(f"{folder}: the chunks of {rule.megatron} do not cover it")
    parts = sum(math.prod(chunk.sizes[: len(rule.stack)]) for chunk in saved.chunks)
    if parts > _MOST_PARTS:
        raise ConversionError(
            f"{folder}: {rule.megatron} is in {parts} parts; at most {_MOST_PARTS}"
        )
    return TORCH_DTYPES[saved.dtype]


def _by_piece(tensor: SavedTensor, stacked: int) -> dict[Shape, list[Saved]]:
    """Return the saved chunks that hold a part of each piece; a chunk may span several layers."""
    found: dict[Shape, list[Saved]] = {}
    for chunk in tensor.chunks:
        spans = zip(chunk.offsets[:stacked], chunk.sizes[:stacked], strict=True)
        for index in itertools.product(*(range(first, first + size) for first, size in spans)):
            found.setdefault(index, []).append(chunk)
    return found


def _check_disjoint(folder: Path, key: str, chunks: Iterable[Saved], stacked: int) -> None:
    """Check that no part of a piece is stored twice: another part would be missing then."""
    spans = sorted(
        [(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True)][stacked:]
        for chunk in chunks
    )
    comparisons = 0
    for number, one in enumerate(spans):
        for other in itertools.islice(spans, number + 1, None):
            if other[0][0] >= one[0][1]:
                break  # the chunks that follow do not begin before this one ends either
            comparisons += 1
            if comparisons > _MOST_SIDE_BY_SIDE * len(spans):
                raise ConversionError(
                    f"{folder}: {key} has more than {_MOST_SIDE_BY_SIDE} chunks with the same rows"
                )
            if all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, other, strict=True)):
                raise ConversionError(
                    f"{folder}: two chunks of {key} hold the same rows, from {one[0][0]} and from "
                    f"{other[0][0]} on"
                )
