"""The arrangement of the rows of several HuggingFace tensors in one Megatron tensor.

Every layout here is a list of row blocks: "the next rows of the Megatron tensor are these rows of that
HuggingFace tensor". Both directions follow the same list, so they cannot disagree. Each block is a run
of contiguous bytes on both sides. A row is a slice along the first axis; the other axes are the same on
both sides. A HuggingFace tensor that Megatron splits in several is in several layouts, each of which
names other rows of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class RowBlock(NamedTuple):
    """Rows [start, start + rows) of the HuggingFace tensor number `source`."""

    source: int
    start: int
    rows: int


Layout = tuple[RowBlock, ...]


def copied(rows: int) -> Layout:
    """Lay out one tensor, unchanged.

    HuggingFace: [rows, …]. Megatron: [rows, …].
    """
    return (RowBlock(0, 0, rows),)


def stacked_rows(*rows: int) -> Layout:
    """Lay out tensors one below the other, in the order given, for example gate, then up.

    HuggingFace: [rows[0], …], [rows[1], …], …. Megatron: [sum(rows), …].
    """
    return tuple(RowBlock(source, 0, count) for source, count in enumerate(rows))


def part_of(rows: int, start: int = 0) -> Layout:
    """Lay out some rows of one tensor, in their order.

    HuggingFace: [at least start + rows, …]. Megatron: [rows, …].
    """
    return (RowBlock(0, start, rows),)


def grouped_gated_qkv(heads: int, kv_heads: int, head_dim: int) -> Layout:
    """Lay out query, output gate, key and value projections, grouped per KV head.

    HuggingFace: q [heads * 2 * head_dim, hidden], in which the gate of each head follows its query; k and
    v [kv_heads * head_dim, hidden].

    Megatron: [(2 * heads + 2 * kv_heads) * head_dim, hidden]. For each KV head come its heads' queries,
    then their gates, then key and value. For example, 4 heads and 2 KV heads give
    q0 q1 g0 g1 k0 v0 q2 q3 g2 g3 k1 v1.
    """
    blocks = []
    for group in range(kv_heads):
        own = range(group * (heads // kv_heads), (group + 1) * (heads // kv_heads))
        for gate in (0, 1):
            blocks += [RowBlock(0, (2 * head + gate) * head_dim, head_dim) for head in own]
        blocks += [RowBlock(source, group * head_dim, head_dim) for source in (1, 2)]
    return tuple(blocks)


def grouped_qkv(heads: int, kv_heads: int, head_dim: int) -> Layout:
    """Lay out query, key and value projections, grouped per KV head.

    HuggingFace: q [heads * head_dim, hidden], k and v [kv_heads * head_dim, hidden].

    Megatron: [(heads + 2 * kv_heads) * head_dim, hidden]. For each KV head come the rows of its heads /
    kv_heads query heads, then of its key, then of its value. For example, 4 heads and 2 KV heads give
    q0 q1 k0 v0 q2 q3 k1 v1.
    """
    q_rows = heads // kv_heads * head_dim
    return tuple(
        RowBlock(source, group * rows, rows)
        for group in range(kv_heads)
        for source, rows in enumerate((q_rows, head_dim, head_dim))
    )


def rows_of(layout: Layout) -> int:
    """Return the number of rows of the Megatron tensor."""
    return sum(block.rows for block in layout)


def moved(layout: Layout, starts: Sequence[int]) -> Layout:
    """Return the same layout of HuggingFace rows that begin `starts[source]` rows further on."""
    return tuple(RowBlock(source, start + starts[source], rows) for source, start, rows in layout)


def clipped(layout: Layout, start: int, stop: int) -> Layout:
    """Return the layout of rows [start, stop) of the Megatron tensor."""
    blocks = []
    first = 0
    for source, source_start, rows in layout:
        begin, end = max(first, start), min(first + rows, stop)
        if begin < end:
            blocks.append(RowBlock(source, source_start + begin - first, end - begin))
        first += rows
    return tuple(blocks)
