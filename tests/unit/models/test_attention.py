"""Attention that keeps the records of a row apart, against plain formulas in fp64."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_profit.models import attention as module
from megatron_profit.models.attention import ScaledDotProductAttention, with_variable_lengths
from megatron_profit.models.record_spans import (
    RecordSpans,
    context_parallel_index,
    find_pieces,
    record_bounds,
)

CPU = torch.device("cpu")


def spans_of(position_ids, **ranks):
    """The places of the records of rows [B, S]."""
    bounds, shape = record_bounds(position_ids), tuple(position_ids.shape)
    return RecordSpans.of(bounds, shape, CPU, **ranks)


# Rows of 24 positions: records of many lengths, of one, a record that fills the row.
RECORDS = [[5, 1, 1, 9, 8], [24], [1, 2, 3, 4, 5, 9], [13, 11]]


def config(**changes: object) -> TransformerConfig:
    sizes = {"num_layers": 1, "hidden_size": 24, "num_attention_heads": 6, "num_query_groups": 2}
    return TransformerConfig(**{**sizes, "attention_dropout": 0.0, **changes})


def attention(**changes: object) -> ScaledDotProductAttention:
    return ScaledDotProductAttention(config(**changes), 1, AttnMaskType.causal, "self")


def positions(records: list[list[int]]) -> torch.Tensor:
    """Position ids [B, S] of rows whose records have these lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in records])


def other_record_or_later(position_ids: torch.Tensor) -> torch.Tensor:
    """[B, 1, S, S], True where attention is forbidden: said by records, not by pieces."""
    record = (position_ids == 0).cumsum(1)
    place = torch.arange(position_ids.size(1))
    forbidden = (record[:, :, None] != record[:, None, :]) | (place[:, None] < place[None, :])
    return forbidden[:, None]


def reference(query, key, value, forbidden):
    """softmax(q k / sqrt(d)) v in fp64, the key/value heads repeated; [S, B, heads, d] inputs."""
    repeats = query.size(2) // key.size(2)
    q, k, v = (t.double().permute(1, 2, 0, 3) for t in (query, key, value))
    k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
    scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(forbidden, -torch.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


def inputs(length: int, rows: int, groups: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(length, rows, n, 4, requires_grad=True) for n in (6, groups, groups)]


def gradients(output: torch.Tensor, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(output, tensors, upstream.to(output.dtype), retain_graph=True)


def assert_close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_attention_is_causal_and_groups_queries(groups):
    tensors = inputs(7, 3, groups)
    expected = reference(*tensors, torch.ones(7, 7).triu(1).bool())
    assert_close(attention(num_query_groups=groups)(*tensors, None), expected)


def test_attention_takes_megatrons_mask():
    tensors = inputs(5, 2)
    forbidden = torch.rand(2, 1, 5, 5) > 0.6
    forbidden[..., 0] = False
    assert_close(attention()(*tensors, forbidden), reference(*tensors, forbidden))


@pytest.mark.parametrize("rows", [RECORDS, RECORDS[:1], RECORDS[1:2], [[1] * 24, [24]]])
def test_records_of_a_row_do_not_see_each_other(rows):
    ids = positions(rows)
    tensors = inputs(24, len(rows))
    expected = reference(*tensors, other_record_or_later(ids))
    actual = attention()(*tensors, packed_seq_params=spans_of(ids))
    assert_close(actual, expected)
    for ours, exact in zip(gradients(actual, tensors), gradients(expected, tensors), strict=True):
        assert_close(ours, exact)


def test_a_record_is_the_same_packed_and_alone_bit_for_bit():
    ids = positions([[5, 7, 12]])
    tensors = inputs(24, 1)
    packed = attention()(*tensors, packed_seq_params=spans_of(ids))
    begin = 0
    for length in (5, 7, 12):
        alone = [t[begin : begin + length] for t in tensors]
        assert torch.equal(attention()(*alone, None), packed[begin : begin + length])
        begin += length


class Ranks:
    """The context-parallel ranks of a test in one process: what a rank gathers, all hold."""

    def __init__(self, tensors: list[torch.Tensor], size: int) -> None:
        length = tensors[0].size(0)
        self.indices = [context_parallel_index(length, size, rank) for rank in range(size)]
        self.parts = [[t[index] for t in tensors] for index in self.indices]

    def gather(self, local: torch.Tensor, group: object) -> torch.Tensor:
        return torch.cat([torch.cat([key, value], dim=-1) for _, key, value in self.parts])


@pytest.mark.parametrize("block", [2, 1024])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_context_parallel_ranks_together_are_the_whole(monkeypatch, size, block):
    ids = positions(RECORDS)
    tensors = inputs(24, len(RECORDS))
    ranks = Ranks(tensors, size)
    monkeypatch.setattr(module, "gather_from_sequence_parallel_region", ranks.gather)
    monkeypatch.setattr(module, "_QUERY_BLOCK", block)
    core = attention()
    core.cp_group = object()
    actual = torch.empty(24, len(RECORDS), 24)
    for rank, (index, part) in enumerate(zip(ranks.indices, ranks.parts, strict=True)):
        rows = spans_of(ids, cp_size=size, cp_rank=rank)
        actual = actual.index_copy(0, index, core(*part, packed_seq_params=rows))
    expected = reference(*tensors, other_record_or_later(ids))
    assert_close(actual, expected)
    for ours, exact in zip(gradients(actual, tensors), gradients(expected, tensors), strict=True):
        assert_close(ours, exact)


class VariableLengthKernel(torch.nn.Module):
    """Stands in for Transformer Engine's core attention, by the documented meaning of its arguments."""

    def forward(
        self, query, key, value, mask, mask_type, attention_bias=None, packed_seq_params=None
    ):
        params = packed_seq_params
        if params is None:
            return "Megatron's own"
        assert (params.qkv_format, mask, query.dim()) == ("thd", None, 3)
        bounds = (params.cu_seqlens_q, params.cu_seqlens_kv)
        assert all(b.dtype == torch.int32 and b[0] == 0 for b in bounds)
        assert [int(b[-1]) for b in bounds] == [len(query), len(key)]
        assert [int(b.diff().max()) for b in bounds] == [params.max_seqlen_q, params.max_seqlen_kv]
        bottom_right = mask_type.name == "padding_causal_bottom_right"
        contexts = []
        for i in range(len(bounds[0]) - 1):
            q, k, v = (
                t[b[i] : b[i + 1], None]
                for t, b in ((query, bounds[0]), (key, bounds[1]), (value, bounds[1]))
            )
            diagonal = 1 + (len(k) - len(q) if bottom_right else 0)
            later = torch.ones(len(q), len(k)).triu(diagonal).bool()
            contexts.append(reference(q, k, v, later)[:, 0])
        return torch.cat(contexts)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_transformer_engine_gets_the_pieces_as_variable_lengths(monkeypatch, size):
    ids = positions(RECORDS)
    tensors = inputs(24, len(RECORDS))
    ranks = Ranks(tensors, size)
    monkeypatch.setattr(module, "gather_from_sequence_parallel_region", ranks.gather)
    monkeypatch.setattr(module.parallel_state, "get_context_parallel_group", lambda: object())
    core = with_variable_lengths(VariableLengthKernel)()
    expected = reference(*tensors, other_record_or_later(ids))
    for rank, (index, part) in enumerate(zip(ranks.indices, ranks.parts, strict=True)):
        rows = spans_of(ids, cp_size=size, cp_rank=rank)
        context = core(*part, None, AttnMaskType.causal, packed_seq_params=rows)
        assert_close(context, expected[index])


def test_transformer_engine_is_left_alone_where_nothing_is_packed():
    core = with_variable_lengths(VariableLengthKernel)()
    tensors = inputs(4, 1)
    assert core(*tensors, None, AttnMaskType.causal) == "Megatron's own"


def test_attention_without_a_kernel_for_records_is_told_once(monkeypatch):
    name = "transformer_engine.pytorch.attention.dot_product_attention"
    chosen = {"use_unfused_attention": True}
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(_attention_backends=chosen))
    module._warn_where_unfused.cache_clear()
    core, tensors = with_variable_lengths(VariableLengthKernel)(), inputs(24, len(RECORDS))
    rows = spans_of(positions(RECORDS))
    with pytest.warns(UserWarning, match="flash-attn .* --transformer-impl local"):
        core(*tensors, None, AttnMaskType.causal, packed_seq_params=rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        core(*tensors, None, AttnMaskType.causal, packed_seq_params=rows)


@pytest.mark.parametrize(("length", "size"), [(8, 2), (24, 3), (40, 4), (7, 1)])
def test_the_ranks_share_a_row_as_megatron_does(monkeypatch, length, size):
    from megatron.core.utils import get_batch_on_this_cp_rank

    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: size)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: group)
    for rank in range(size):
        batch = get_batch_on_this_cp_rank({"tokens": torch.arange(length)[None]}, False, rank)
        assert torch.equal(context_parallel_index(length, size, rank), batch["tokens"][0])


def test_pieces_hold_every_position_once():
    ids = positions(RECORDS)
    for size in (1, 2, 3, 4, 6):
        seen = torch.zeros_like(ids)
        for rank in range(size):
            index = context_parallel_index(24, size, rank)
            for piece in find_pieces(record_bounds(ids), ids.size(1), size, rank):
                queries = index[piece.query : piece.query + piece.queries]
                seen[piece.row, queries] += 1
                last_key = piece.key + piece.keys - 1
                assert ids[piece.row, piece.key] == 0
                assert queries[-1] == last_key
                assert torch.equal(queries, queries[0] + torch.arange(piece.queries))
        assert (seen == 1).all()


def test_whole_rows_of_a_rank_hold_all_records():
    ids = positions(RECORDS)
    alone, rank = spans_of(ids), spans_of(ids, cp_size=2, cp_rank=1)
    assert alone.whole is alone
    assert rank.whole.pieces == alone.pieces
    assert torch.equal(rank.whole.variable_lengths.cu_queries, alone.variable_lengths.cu_queries)


def test_bounds_of_records():
    rows = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]])
    assert record_bounds(rows).tolist() == [0, 2, 4, 7, 8]


def test_rows_that_cannot_be_used_are_named():
    with pytest.raises(ValueError, match="row 1 of 2 begins at position 3"):
        record_bounds(torch.tensor([[0, 1], [3, 4]]))
    with pytest.raises(ValueError, match=r"26 positions .* multiple of 4"):
        context_parallel_index(26, 2, 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"window_size": (4, 0)}, "window_size"),
        ({"softmax_type": "learnable"}, "softmax_type=learnable"),
    ],
)
def test_attention_refuses_what_it_cannot_do(changes, named):
    with pytest.raises(ValueError, match=named):
        attention(**changes)


def test_attention_refuses_other_packed_sequences():
    with pytest.raises(ValueError, match="PackedSeqParams"):
        attention()(*inputs(5, 2), packed_seq_params=PackedSeqParams(qkv_format="thd"))
