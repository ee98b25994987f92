"""From the data iterator to the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the training device, all [B, S] int64.

    Attributes:
        tokens: Token ids.
        labels: The next token where it is supervised, else -100.
        position_ids: Position in the segment; 0 where one begins.
        record_index: The example that a token belongs to, -1 in padding.
        sample_index: Distinct for each time that an example is drawn, -1 in padding.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    record_index: torch.Tensor
    sample_index: torch.Tensor


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]]) -> Batch:
    """Take the next micro-batch. Every rank reads its own copy, so nothing is broadcast."""
    return Batch(
        **{key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
    )
