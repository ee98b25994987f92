"""Megatron's forward step: a micro-batch through the model, and how to get its loss."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from megatron.training import get_args, get_timers
from megatron.training.training import update_seqlen_stats_from_cu_seqlens

from megatron_profit.models.record_spans import rotary_angles
from megatron_profit.training.step.batch import Batch, get_batch
from megatron_profit.training.step.experts import router_padding
from megatron_profit.training.step.row_length import row_multiple


class BatchLoss(Protocol):
    """The handling of one micro-batch on the last pipeline stage."""

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `GPTModel.forward`, besides `labels`."""

    @property
    def loss_func(self) -> Callable:
        """Megatron's loss function of the micro-batch."""


def make_forward_step(begin: Callable[[Batch], BatchLoss]) -> Callable:
    """Return a forward step for Megatron's schedules.

    Args:
        begin: Called with each micro-batch before the model.
    """

    def forward_step(data_iterator: Iterator, model: GPTModel) -> tuple[torch.Tensor, Callable]:
        args, timers = get_args(), get_timers()
        gpt: GPTModel = unwrap_model(model)
        timers("batch-generator", log_level=2).start()
        batch = get_batch(
            data_iterator, isolate=needs_record_spans(args), multiple=row_multiple(args)
        )
        timers("batch-generator").stop()
        if batch.spans is not None:
            batch.spans.rotary = rotary_angles(gpt, batch.position_ids, args.seq_length)
        if torch.is_grad_enabled() and not gpt.vp_stage:
            _count_tokens(batch)
        loss = begin(batch)
        output = model(
            batch.tokens,
            batch.position_ids,
            None,
            labels=batch.labels,
            packed_seq_params=batch.spans,
            padding_mask=router_padding(batch.example_index, gpt),
            **loss.model_kwargs,
        )
        return output, loss.loss_func

    return forward_step


def _count_tokens(batch: Batch) -> None:
    """Give Megatron's count of floating-point operations the tokens of records, not of rows with their
    padding.
    """
    cu_seqlens = batch.cu_seqlens
    if cu_seqlens.numel() < 2:
        # Rows of padding only: Megatron sums over the ranks where there is a count on each of them.
        cu_seqlens = cu_seqlens.new_zeros(2)
    update_seqlen_stats_from_cu_seqlens(cu_seqlens)


def needs_record_spans(args: Namespace) -> bool:
    """Return whether attention has to know where the records of a row lie.

    Without packing, only padding follows a record, and causal attention does not see it. Under context
    parallelism this project's own attention goes by records in any case; Transformer Engine's does not.
    """
    return args.packing or (args.context_parallel_size > 1 and args.transformer_impl == "local")
