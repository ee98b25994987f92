"""Weights with their adapters merged in: W + scale * B A, in float32 and rounded once.

A `MergedWeights` reads like the model that it merges into, one run of rows at a time. So a conversion
streams it: the memory is that of a few runs of rows and of some A factors.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from checkpoint_conversion.adapters.options import factor_b, weight_of
from checkpoint_conversion.engine.dtypes import F32, DType
from checkpoint_conversion.engine.raw_files import OpenFiles
from checkpoint_conversion.engine.values import as_float32, deliver
from checkpoint_conversion.families import TensorRule
from checkpoint_conversion.families.family import StackedSlice
from checkpoint_conversion.hf.chunks import TensorChunk
from checkpoint_conversion.hf.source import ModelSource, Weights

# A factors that are kept: neighbouring runs of rows, which several threads read, share them.
_KEPT = 16


def read_float32(
    weights: Weights, chunk: TensorChunk, files: OpenFiles, finite: bool = False
) -> np.ndarray:
    """Return the values of a chunk of a matrix, [rows, columns] float32."""
    data = memoryview(bytearray(chunk.elements * F32.itemsize))
    weights.read_into(chunk, F32, data, files, finite)
    return as_float32(data, F32).reshape(chunk.rows, -1)


@dataclass(frozen=True)
class _Place:
    """A factor, or some of its rows, in a model of adapters."""

    rule: TensorRule
    piece: StackedSlice

    def rows(self, start: int, rows: int) -> TensorChunk | None:
        """Return where rows [start, start + rows) of the factor are; None if they are in another place."""
        first = 0
        for _, own, count in self.rule.layout:
            if own <= start and start + rows <= own + count:
                return TensorChunk(self.rule, self.piece, first + start - own, rows)
            first += count
        return None


@dataclass(frozen=True)
class MergedWeights:
    """A model and its adapters as one model (a `ModelSource`).

    Attributes:
        base: The model.
        adapters: The adapters.
        scale: The factor of B A.
    """

    base: ModelSource
    adapters: ModelSource
    scale: float
    _factors: Mapping[str, tuple[_Place, tuple[_Place, ...]]]
    _named: Mapping[str, Mapping[tuple[int, ...], _Place]]
    _kept: OrderedDict[str, np.ndarray] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def folder(self) -> Path:
        """The folder of the adapters."""
        return self.adapters.folder

    @property
    def dtypes(self) -> Mapping[str, DType]:
        """The dtype of each tensor of the model, by key."""
        return self.base.dtypes

    @property
    def padding(self) -> int:
        """Rows that pad the vocabulary of the model; they are not read."""
        return self.base.padding

    @property
    def rules(self) -> tuple[TensorRule, ...]:
        """The name table of the model."""
        return self.base.rules

    def chunks(self, rule: TensorRule) -> Iterator[TensorChunk]:
        """Return the chunks in which to read a tensor."""
        return self.base.chunks(rule)

    def check_rest(self, files: OpenFiles) -> None:
        """Check the parts of both models' files that no chunk has read."""
        for part in (self.base, self.adapters):
            part.check_rest(files)

    def read_into(
        self,
        chunk: TensorChunk,
        dtype: DType,
        into: memoryview,
        files: OpenFiles,
        finite: bool = False,
    ) -> None:
        """Read the merged values of a chunk in a dtype, as bytes.

        Args:
            into: A buffer of the size of the chunk.
            files: Open files, which stay open for the next call.
            finite: Refuse NaN and infinity.

        Raises:
            ConversionError: When a file cannot be read, or a value is outside the range of the dtype.
        """
        own = self._with_own_names(chunk)
        parts = own.layout
        if not any(own.piece.hf[part.source] in self._factors for part in parts):
            self.base.read_into(chunk, dtype, into, files, finite)
            return
        values = read_float32(self.base, chunk, files, finite)
        first = 0
        for source, start, rows in parts:
            weight = own.piece.hf[source]
            if weight in self._factors:
                values[first : first + rows] += self._delta(weight, start, rows, files)
            first += rows
        data = memoryview(values).cast("B")
        deliver(data, F32, into, dtype, chunk.key, finite)
        if dtype == F32:
            into[:] = data

    def _with_own_names(self, chunk: TensorChunk) -> TensorChunk:
        """Return the chunk under the names that adapters have: of each expert, whatever form the base has."""
        places = self._named.get(chunk.key)
        if places is None:
            return chunk
        place = places[chunk.piece.index]
        return TensorChunk(place.rule, place.piece, chunk.start, chunk.rows)

    def _delta(self, weight: str, start: int, rows: int, files: OpenFiles) -> np.ndarray:
        """Return rows of scale * B A, in PEFT's order of operations."""
        _, parts = self._factors[weight]
        (chunk,) = filter(None, (part.rows(start, rows) for part in parts))
        product = read_float32(self.adapters, chunk, files) @ self._a(weight, files)
        return product * np.float32(self.scale)

    def _a(self, weight: str, files: OpenFiles) -> np.ndarray:
        with self._lock:
            if weight in self._kept:
                self._kept.move_to_end(weight)
                return self._kept[weight]
        place, _ = self._factors[weight]
        chunk = place.rows(0, place.rule.piece_shape[0])
        assert chunk is not None, "an A is one tensor"
        values = read_float32(self.adapters, chunk, files)
        with self._lock:
            self._kept[weight] = values
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return values


def merged(
    base: ModelSource, adapters: ModelSource, scale: float, rules: Iterable[TensorRule]
) -> MergedWeights:
    """Return a model with adapters merged in.

    Args:
        base: The model.
        adapters: The adapters.
        scale: The factor of B A.
        rules: The name table that the adapters are made of. The base may have another one, with the experts
            of a layer in one tensor.
    """
    places: dict[str, list[_Place]] = {}
    for rule in adapters.rules:
        for piece in rule.pieces():
            (name,) = piece.hf
            places.setdefault(name, []).append(_Place(rule, piece))
    factors = {
        weight_of(name): (of_a[0], tuple(places[factor_b(name)]))
        for name, of_a in places.items()
        if factor_b(name) != name
    }
    usual = {own.megatron: own for rule in rules for own in (rule, *rule.per_layer())}
    named = {
        rule.megatron: {piece.index: _Place(own, piece) for piece in own.pieces()}
        for rule in base.rules
        if (own := usual.get(rule.megatron)) is not None and own.hf != rule.hf
    }
    return MergedWeights(base, adapters, scale, factors, named)
