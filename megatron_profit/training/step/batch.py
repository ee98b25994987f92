"""From the data iterator to the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import mpu

from megatron_profit.models.record_spans import RecordSpans, context_parallel_index, record_bounds
from megatron_profit.training.step.row_length import cut_rows


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the training device: tensors [B, L] int64.

    L are the positions of a row that this rank holds, all of them without context parallelism. Micro-batches
    differ in it where rows are cut (row_length.py).

    Attributes:
        tokens: Token ids.
        labels: The next token where it is supervised, else -100.
        position_ids: Position in the segment; 0 where one begins.
        example_index: The example that a token belongs to, -1 in padding.
        draw_index: Distinct for each time that an example is drawn, -1 in padding.
        spans: Places of the records in the whole rows; None where attention does not need them.
        records: [records] int64 on the CPU, the example of each record of the whole rows, in order.
        cu_seqlens: [records + 1] int64 on the CPU, tokens of the records so far.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    example_index: torch.Tensor
    draw_index: torch.Tensor
    spans: RecordSpans | None
    records: torch.Tensor
    cu_seqlens: torch.Tensor


def get_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]], *, isolate: bool, multiple: int | None = None
) -> Batch:
    """Take the next micro-batch.

    Every rank reads its own copy of the whole rows. So no data is broadcast, and middle pipeline stages know
    the records as well.

    Args:
        data_iterator: Gives tensors [B, S] on the CPU.
        isolate: Whether attention gets the places of the records.
        multiple: Rows are cut after the longest record, to a multiple of this; None leaves them whole.
    """
    whole = next(data_iterator)
    if multiple is not None:
        whole = cut_rows(whole, multiple)
    cp = (mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank())
    own = context_parallel_index(whole["tokens"].size(1), *cp)
    part = {
        name: (values if cp[0] == 1 else values[:, own]).cuda(non_blocking=True)
        for name, values in whole.items()
    }
    # Found on the CPU, where the data are: a GPU would have to be waited for.
    bounds, (rows, length) = record_bounds(whole["position_ids"]), whole["tokens"].shape
    spans = RecordSpans.of(bounds, (rows, length), part["tokens"].device, *cp) if isolate else None
    records, cu_seqlens = _records(bounds, whole["example_index"])
    return Batch(**part, spans=spans, records=records, cu_seqlens=cu_seqlens)


def _records(
    bounds: torch.Tensor, example_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `Batch.records` and `Batch.cu_seqlens` of rows [B, S], without the padding."""
    records = example_index.flatten()[bounds[:-1]]
    lengths = bounds.diff()[records >= 0]
    return records[records >= 0], torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
