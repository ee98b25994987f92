"""Attention that keeps the records of a row apart, with Transformer Engine and without it.

The interface of both core attentions is Megatron's; `RecordSpans` in place of its PackedSeqParams says where
records lie. Context parallelism gathers keys and values over its group and computes the rank's own queries
exactly: with grouped-query attention keys and values are small, and records may lie anywhere in a row.

Shapes: query [L, B, heads, head_dim], key and value [L, B, KV heads, head_dim], context [L, B, heads *
head_dim]; L positions of a row on this rank, S of the whole row.
"""

from __future__ import annotations

import enum
import functools
import os
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_profit.models.engine_kernels import computes_unfused
from megatron_profit.models.record_spans import QuerySpan, RecordSpans

# Queries that attend at once where a mask is needed, which has this many rows.
_QUERY_BLOCK = 1024
# Each micro-batch has shapes of its own, by its records or by the length of its rows, and cuDNN, which torch
# prefers on some GPUs, builds a plan for each: 50 ms and more.
_FOR_NEW_SHAPES = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention with rotary angles that begin at 0 in each record."""

    def forward(
        self,
        *args: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(packed_seq_params, RecordSpans) and packed_seq_params.rotary is not None:
            rotary_pos_emb = packed_seq_params.rotary
        return super().forward(
            *args, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params, **kwargs
        )


class ScaledDotProductAttention(MegatronModule):
    """Causal core attention on torch's scaled_dot_product_attention.

    The interface is the same as for megatron.core.transformer.dot_product_attention.DotProductAttention.
    Memory grows with the sequence length, not with its square: records of similar length attend as one batch.
    Only the queries whose record began on another context-parallel chunk need a mask, in blocks.

    Raises:
        ValueError: The model needs Transformer Engine: attention that is not causal self-attention, a
            learnable softmax offset, an attention window.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        unsupported = {
            "attn_mask_type": attn_mask_type is not AttnMaskType.causal,
            "softmax_type": config.softmax_type != "vanilla",
            "window_size": config.window_size is not None,
            "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
        }
        for name, is_unsupported in unsupported.items():
            if is_unsupported:
                value = attn_mask_type if name == "attn_mask_type" else getattr(config, name)
                raise ValueError(
                    f"{name}={value} needs Transformer Engine; install it or drop the option"
                )
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.cp_group = _cp_group(config, pg_collection)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query, key, value: Shapes as at the top of this file.
            attention_mask: Broadcastable to [B, heads, S, S], True where attention is forbidden;
                None means causal.
            packed_seq_params: `RecordSpans` for rows of several records, and for context parallelism.

        Returns:
            Context [L, B, heads * head_dim].
        """
        if attention_bias is not None:
            raise ValueError("an attention bias needs Transformer Engine")
        if packed_seq_params is None and self.cp_group is None:
            q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
            with sdpa_kernel(_FOR_NEW_SHAPES, set_priority=True):
                context = self._attend(q, k, v, attention_mask)
            return context.permute(2, 0, 1, 3).flatten(2)
        if not isinstance(packed_seq_params, RecordSpans) or attention_mask is not None:
            raise ValueError(
                "without Transformer Engine, packed rows and context parallelism go by RecordSpans "
                f"and without an attention mask; got {type(packed_seq_params).__name__}"
            )
        if self.cp_group is not None:
            key, value = gather_keys_values(key, value, packed_seq_params, self.cp_group)
        with sdpa_kernel(_FOR_NEW_SHAPES, set_priority=True):
            return self._attend_in_records(query, key, value, packed_seq_params)

    def _attend_in_records(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: RecordSpans
    ) -> torch.Tensor:
        """Return the context [L, B, heads * head_dim] of query [L, B, …].

        Key and value [S, B, …] are the whole rows'.
        """
        plan = rows.plan
        contexts = []
        for bucket in plan.buckets:
            heads_first = (
                t.flatten(0, 1)
                .index_select(0, index)
                .unflatten(0, (bucket.count, -1))
                .transpose(1, 2)
                for t, index in (
                    (query, bucket.query_index),
                    (key, bucket.key_index),
                    (value, bucket.key_index),
                )
            )
            contexts.append(self._attend(*heads_first).transpose(1, 2).flatten(0, 1))
        for piece in plan.continued:
            contexts += self._attend_with_earlier_keys(query, key, value, piece)
        # Gathered in both directions, because every token has one place.
        context = torch.cat(contexts).flatten(1).index_select(0, plan.order)
        return context.unflatten(0, query.shape[:2])

    def _attend_with_earlier_keys(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, piece: QuerySpan
    ) -> list[torch.Tensor]:
        """Return contexts [queries, heads, head_dim] of a piece whose record began before its first query."""
        contexts = []
        for begin in range(0, piece.queries, _QUERY_BLOCK):
            end = min(begin + _QUERY_BLOCK, piece.queries)
            keys = piece.keys - piece.queries + end
            parts = (
                (query, piece.query + begin, end - begin),
                (key, piece.key, keys),
                (value, piece.key, keys),
            )
            q, k, v = (
                t[start : start + count, piece.row].transpose(0, 1).unsqueeze(0)
                for t, start, count in parts
            )
            later = torch.ones(end - begin, keys, dtype=torch.bool, device=query.device)
            later = later.triu_(keys - (end - begin) + 1)
            contexts.append(self._attend(q, k, v, later).squeeze(0).transpose(0, 1))
        return contexts

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        forbidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return a context like query [n, heads, queries, head_dim].

        Key and value are [n, KV heads, keys, head_dim]. Attention is causal unless a mask says which keys are
        forbidden.
        """
        dropout = self.dropout if self.training else 0.0
        with get_cuda_rng_tracker().fork() if dropout > 0.0 else nullcontext():
            return torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if forbidden is None else ~forbidden,
                dropout_p=dropout,
                is_causal=forbidden is None,
                scale=self.softmax_scale,
                enable_gqa=query.size(1) != key.size(1),
            )


class _ThdMask(enum.Enum):
    """A mask of Transformer Engine that Megatron's AttnMaskType has no name for."""

    padding_causal_bottom_right = 1


class _VariableLengths:
    """Lets a core attention of Transformer Engine understand `RecordSpans`.

    Its variable-length kernels take the pieces as they are, also those with more keys than queries.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: enum.Enum,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        attend = functools.partial(
            super().forward,  # type: ignore[misc]
            attention_bias=attention_bias,
            **kwargs,
        )
        if not isinstance(packed_seq_params, RecordSpans):
            return attend(
                *(query, key, value, attention_mask, attn_mask_type),
                packed_seq_params=packed_seq_params,
            )
        rows, shape = packed_seq_params, query.shape[:2]
        lengths = rows.variable_lengths
        thd = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=lengths.cu_queries,
            cu_seqlens_kv=lengths.cu_keys,
            max_seqlen_q=lengths.max_queries,
            max_seqlen_kv=lengths.max_keys,
        )
        if rows.cp_size > 1:
            group = parallel_state.get_context_parallel_group()
            key, value = gather_keys_values(key, value, rows, group)
            thd.local_cp_size = 1  # the kernel itself is not to communicate
            attn_mask_type = _ThdMask.padding_causal_bottom_right
        query, key, value = (t.transpose(0, 1).flatten(0, 1) for t in (query, key, value))
        if lengths.key_index is not None:
            key, value = (t.index_select(0, lengths.key_index) for t in (key, value))
        context = attend(query, key, value, None, attn_mask_type, packed_seq_params=thd)
        _warn_where_unfused()
        return context.flatten(1).unflatten(0, shape[::-1]).transpose(0, 1).contiguous()


@functools.cache
def _warn_where_unfused() -> None:
    """Warn once, on the first rank: attention without a kernel works, but writes out all scores."""
    if os.environ.get("RANK", "0") == "0" and computes_unfused():
        warnings.warn(
            "Transformer Engine has no variable-length attention kernel here and computes all scores of "
            "a row, which is slow and takes memory by its square. Install flash-attn or a newer cuDNN "
            "(NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 prints why), or pass --transformer-impl local",
            stacklevel=2,
        )


@functools.cache
def with_variable_lengths(core_attention: type) -> type:
    """Return a subclass of Transformer Engine's core attention that understands `RecordSpans`."""
    name = f"Packed{core_attention.__name__}"
    return type(name, (_VariableLengths, core_attention), {})


def gather_keys_values(
    key: torch.Tensor,
    value: torch.Tensor,
    rows: RecordSpans,
    group: torch.distributed.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather keys and values [L, B, KV heads, head_dim] of each rank into whole rows [S, B, …].

    The backward pass sums the gradients of all ranks' queries and gives each rank its own part.
    """
    both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=group)
    both = both.index_select(0, rows.natural_order)
    key, value = both.split([key.size(-1), value.size(-1)], dim=-1)
    return key, value


def _cp_group(
    config: TransformerConfig, pg_collection: ProcessGroupCollection | None
) -> torch.distributed.ProcessGroup | None:
    """Return the context-parallel group; None where it has one rank."""
    if config.context_parallel_size == 1:
        return None
    return (
        parallel_state.get_context_parallel_group() if pg_collection is None else pg_collection.cp
    )
