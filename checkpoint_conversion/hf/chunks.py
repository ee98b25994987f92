"""The unit of work: a run of rows of one Megatron tensor, small enough to be held in memory.

A chunk never spans layers, so the model's size adds only the list of chunks to the memory. A checkpoint
stores chunks of at most CHUNK_BYTES. They are moved in parts of TRANSFER_BYTES, which stay in a core's
cache between reading, the checksum and writing. Moving 8 MB at a time took twice the CPU time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from checkpoint_conversion.engine.dtypes import DType
from checkpoint_conversion.families.family import Shape, StackedSlice, TensorRule
from checkpoint_conversion.families.layouts import Layout, clipped

CHUNK_BYTES = 8 << 20
TRANSFER_BYTES = 1 << 20


@dataclass(frozen=True)
class TensorChunk:
    """Rows [start, start + rows) of one piece of a Megatron tensor."""

    rule: TensorRule
    piece: StackedSlice
    start: int
    rows: int

    @property
    def key(self) -> str:
        """The Megatron tensor."""
        return self.rule.megatron

    @property
    def offsets(self) -> Shape:
        """Position in the Megatron tensor, stacked axes first."""
        return (*self.piece.index, self.start, *(0 for _ in self.rule.piece_shape[1:]))

    @property
    def sizes(self) -> Shape:
        """Extent in the Megatron tensor; 1 on the stacked axes."""
        return (*(1 for _ in self.piece.index), self.rows, *self.rule.piece_shape[1:])

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.rows * math.prod(self.rule.piece_shape[1:])

    @property
    def layout(self) -> Layout:
        """The HuggingFace rows that these rows are made of."""
        return clipped(self.rule.layout_of(self.piece), self.start, self.start + self.rows)

    def parts(self, dtype: DType, limit: int = TRANSFER_BYTES) -> Iterator[TensorChunk]:
        """Cut this chunk into runs of rows of at most `limit` bytes each, but at least a row."""
        step = max(1, limit * self.rows // (self.elements * dtype.itemsize))
        for first in range(0, self.rows, step):
            rows = min(step, self.rows - first)
            yield TensorChunk(self.rule, self.piece, self.start + first, rows)


def chunks_of(rule: TensorRule, dtype: DType, limit: int = CHUNK_BYTES) -> Iterator[TensorChunk]:
    """Yield the chunks that make up a Megatron tensor, each of at most `limit` bytes but at least a row."""
    for piece in rule.pieces():
        yield from TensorChunk(rule, piece, 0, rule.piece_shape[0]).parts(dtype, limit)
