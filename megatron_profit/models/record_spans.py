"""The places of records in a micro-batch, for an attention that does not see across records.

The hidden states keep Megatron's shape [S, B, H], whatever records the rows hold. So pipeline, virtual
pipeline and sequence parallelism work unchanged. Only attention asks where records begin, and `RecordSpans`
tells it: this object takes the place of Megatron's PackedSeqParams.

Context parallelism splits each row as Megatron does, into 2 * CP chunks. Rank r holds chunks r and
2 * CP - 1 - r (a causal mask gives them equal work). For example, with CP = 2 rank 0 holds chunks 0 and 3.
A record may lie across chunks: its queries on a rank are one or two `QuerySpan`s, whose keys begin with the
record.

Shape suffixes: B rows, S positions of a row, L positions of a row on this rank, T = B * L.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams

# Records attend together, padded to the longest among them, as long as none is shorter than this share of it.
_SIMILAR = 0.75


@dataclass(frozen=True)
class QuerySpan:
    """Consecutive queries of one record on this rank, and the keys that they may see.

    Query i sees the keys up to number keys - queries + i. For example, with 2 queries and 5 keys, query 0
    sees keys 0 to 3 and query 1 sees all.

    Attributes:
        row: Its row in the micro-batch.
        query: First query, counted in the rank's part of the row.
        queries: Number of queries.
        key: First key, counted in the whole row.
        keys: Number of keys.
    """

    row: int
    query: int
    queries: int
    key: int
    keys: int


@dataclass(frozen=True)
class Bucket:
    """Pieces of similar length whose queries and keys are the same tokens, for one batched call.

    Attributes:
        count, length: Number of pieces, and tokens of the longest.
        query_index: [count * length] int64, tokens of this rank in sequence-first order [L, B]. A shorter
            piece repeats its last token: no causal query before it sees the repetitions.
        key_index: The same tokens in the order [S, B] of the whole rows.
    """

    count: int
    length: int
    query_index: torch.Tensor
    key_index: torch.Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """The order in which attention without a variable-length kernel handles the pieces.

    Attributes:
        buckets: Pieces that begin with their record, which need no mask but the causal one.
        continued: Pieces whose record began on another chunk of the row.
        order: [T] int64, for each token in the order [L, B] its place in the outputs of the buckets and
            of the continued pieces, one after the other.
    """

    buckets: tuple[Bucket, ...]
    continued: tuple[QuerySpan, ...]
    order: torch.Tensor


@dataclass(frozen=True)
class VariableLengths:
    """Arguments of a variable-length ("thd") attention kernel.

    Attributes:
        cu_queries, cu_keys: [pieces + 1] int32, where the queries and the keys of each piece begin.
        max_queries, max_keys: Queries and keys of the longest piece.
        key_index: [cu_keys[-1]] int64, tokens of the whole rows in the order [B, S]; None where each
            token is a key once, in order.
    """

    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    max_queries: int
    max_keys: int
    key_index: torch.Tensor | None


def context_parallel_chunks(seq_length: int, cp_size: int, cp_rank: int) -> list[tuple[int, int]]:
    """Return the parts (begin, end) of a row that a context-parallel rank holds, in order.

    Raises:
        ValueError: When the row cannot be split.
    """
    if cp_size == 1:
        return [(0, seq_length)]
    if seq_length % (2 * cp_size):
        raise ValueError(
            f"a row of {seq_length} positions cannot be split into 2 x {cp_size} chunks; make the "
            f"sequence length a multiple of {2 * cp_size}"
        )
    chunk = seq_length // (2 * cp_size)
    first, second = cp_rank * chunk, (2 * cp_size - 1 - cp_rank) * chunk
    return [(first, first + chunk), (second, second + chunk)]


def context_parallel_index(seq_length: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Return [L] int64, the positions of a row that a context-parallel rank holds."""
    chunks = context_parallel_chunks(seq_length, cp_size, cp_rank)
    return torch.cat([torch.arange(begin, end) for begin, end in chunks])


def record_bounds(position_ids: torch.Tensor) -> torch.Tensor:
    """Return [segments + 1] int64, where the segments of rows [B, S] begin in the flattened rows, and B * S.

    A segment is a record, or the padding at the end of a row. For example, rows of 4 positions 0 1 0 1 and
    0 1 2 0 give 0, 2, 4, 7 and 8.

    Args:
        position_ids: [B, S] integers on the CPU; 0 exactly where a segment begins.

    Raises:
        ValueError: When a row does not begin with position 0.
    """
    first = position_ids[:, 0]
    if first.any():
        row = int(first.nonzero()[0])
        raise ValueError(f"row {row} of {len(first)} begins at position {first[row]}, not at 0")
    begins = (position_ids.flatten() == 0).nonzero()[:, 0]
    return torch.cat([begins, begins.new_tensor([position_ids.numel()])])


def find_pieces(
    bounds: torch.Tensor, seq_length: int, cp_size: int = 1, cp_rank: int = 0
) -> list[QuerySpan]:
    """Return the pieces of a micro-batch on one rank, by row and then by place in the row.

    Args:
        bounds: From `record_bounds`.
        seq_length: Positions of a whole row.

    Raises:
        ValueError: When a row cannot be split.
    """
    chunks = context_parallel_chunks(seq_length, cp_size, cp_rank)
    pieces = []
    segments = pairwise(bounds.tolist())
    for row, segments_of_row in groupby(segments, lambda segment: segment[0] // seq_length):
        spans = [
            (begin - row * seq_length, end - row * seq_length) for begin, end in segments_of_row
        ]
        local = 0
        for first, last in chunks:
            for begin, end in spans:
                query, stop = max(begin, first), min(end, last)
                if query < stop:
                    here = local + query - first
                    pieces.append(QuerySpan(row, here, stop - query, begin, stop - begin))
            local += last - first
    return pieces


@dataclass
class RecordSpans(PackedSeqParams):
    """The `packed_seq_params` of this project: rows of several records, isolated from each other.

    Attributes:
        cu_seqlens_q, cu_seqlens_kv: [records + 1] int32 on the CPU, where the records begin in [B, S].
        pieces: The pieces on this rank.
        shape: (B, S) of the whole rows.
        device: The device of the attention.
        cp_size: Context-parallel ranks that share a row.
        rotary: [L, B, 1, head_dim] fp32, rotary angles by the position in the record; None leaves
            Megatron's, which go by the position in the row. Attention scores depend on differences of
            angles within a record only, so both mean the same.
    """

    pieces: tuple[QuerySpan, ...] = ()
    shape: tuple[int, int] = (0, 0)
    device: torch.device | None = None
    cp_size: int = 1
    rotary: torch.Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # GPTModel makes rotary angles for this many positions; "thd" would change the shape of the
        # hidden states in the pipeline.
        self.max_seqlen_q = self.max_seqlen_kv = self.shape[1]
        self.qkv_format = "sbhd"

    @classmethod
    def of(
        cls,
        bounds: torch.Tensor,
        shape: tuple[int, int],
        device: torch.device,
        cp_size: int = 1,
        cp_rank: int = 0,
    ) -> RecordSpans:
        """Return the places of a micro-batch's records.

        Args:
            bounds: From `record_bounds`.
            shape: (B, S) of the whole rows.
            device: The device of the attention.
            cp_size: Context-parallel ranks that share a row.
            cp_rank: This rank among them.
        """
        cu_seqlens = bounds.int()
        return cls(
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            pieces=tuple(find_pieces(bounds, shape[1], cp_size, cp_rank)),
            shape=shape,
            device=device,
            cp_size=cp_size,
        )

    @cached_property
    def whole(self) -> RecordSpans:
        """The records in whole rows, for layers that see them on each context-parallel rank."""
        if self.cp_size == 1:
            return self
        assert self.device is not None, "`of` sets it"
        return RecordSpans.of(self.cu_seqlens_q.long(), self.shape, self.device)

    @cached_property
    def plan(self) -> AttentionPlan:
        """The order of attention on scaled_dot_product_attention."""
        own = [piece for piece in self.pieces if piece.queries == piece.keys]
        groups = _similar_lengths(own)
        continued = [piece for piece in self.pieces if piece.queries < piece.keys]
        order = np.empty((self.shape[1] // self.cp_size, self.shape[0]), dtype=np.int64)
        place = 0
        for group in groups:
            for piece in group:
                _tokens(order, piece)[:] = np.arange(place, place + piece.queries)
                place += group[0].queries
        for piece in continued:
            _tokens(order, piece)[:] = np.arange(place, place + piece.queries)
            place += piece.queries
        return AttentionPlan(
            tuple(self._bucket(group) for group in groups),
            tuple(continued),
            self._moved(order.ravel()),
        )

    @cached_property
    def variable_lengths(self) -> VariableLengths:
        """The arguments of a variable-length kernel."""
        queries, keys = ([getattr(p, n) for p in self.pieces] for n in ("queries", "keys"))
        key_index = None
        if self.cp_size > 1:
            starts = [p.row * self.shape[1] + p.key for p in self.pieces]
            key_index = self._moved(
                np.concatenate([np.arange(s, s + n) for s, n in zip(starts, keys, strict=True)])
            )
        cu_queries, cu_keys = (
            self._moved(np.cumsum([0, *counts], dtype=np.int32)) for counts in (queries, keys)
        )
        return VariableLengths(cu_queries, cu_keys, max(queries), max(keys), key_index)

    @cached_property
    def natural_order(self) -> torch.Tensor:
        """[S] int64, for each position of a row its place in the parts of all ranks one after another."""
        seq_length = self.shape[1]
        parts = [
            context_parallel_index(seq_length, self.cp_size, rank) for rank in range(self.cp_size)
        ]
        return torch.argsort(torch.cat(parts)).to(self.device, non_blocking=True)

    def _bucket(self, group: list[QuerySpan]) -> Bucket:
        length, rows = group[0].queries, self.shape[0]
        offset = np.minimum(
            np.arange(length)[None, :], np.array([p.queries - 1 for p in group])[:, None]
        )
        row = np.array([p.row for p in group])[:, None]
        query, key = (
            ((np.array([getattr(p, name) for p in group])[:, None] + offset) * rows + row).ravel()
            for name in ("query", "key")
        )
        query_index = self._moved(query)
        key_index = query_index if self.cp_size == 1 else self._moved(key)
        return Bucket(len(group), length, query_index, key_index)

    def _moved(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def rotary_angles(
    model: GPTModel, position_ids: torch.Tensor, seq_length: int
) -> torch.Tensor | None:
    """Return the rotary angles by the position in the record.

    Args:
        position_ids: [B, L] int64, below `seq_length`.

    Returns:
        [L, B, 1, head_dim] fp32; None where the model has no such angles, or where a fused kernel
        applies them, which takes one angle for a position of all rows.
    """
    if model.position_embedding_type != "rope" or model.config.apply_rope_fusion:
        return None
    table = model.rotary_pos_emb.get_emb(seq_length)
    return table[:, 0, 0][position_ids.T][:, :, None]


def _tokens(order: np.ndarray, piece: QuerySpan) -> np.ndarray:
    """Return the part of [L, B] that holds the piece's queries."""
    return order[piece.query : piece.query + piece.queries, piece.row]


def _similar_lengths(pieces: list[QuerySpan]) -> list[list[QuerySpan]]:
    """Return the pieces in groups of similar lengths, each with its longest first."""
    groups: list[list[QuerySpan]] = []
    for piece in sorted(pieces, key=lambda p: -p.queries):
        if groups and piece.queries >= _SIMILAR * groups[-1][0].queries:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups
