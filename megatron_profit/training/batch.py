"""From the data iterator to the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the training device, all int64.

    Attributes:
        tokens: [B, S].
        labels: [B, S], the next token where it is supervised, else -100.
        position_ids: [B, S].
        sample_index: [B], distinct for each sample of the run.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    sample_index: torch.Tensor


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]]) -> Batch:
    """Take the next micro-batch. Every rank reads its own copy, so nothing is broadcast."""
    data = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
    tokens = data["tokens"]
    position_ids = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    return Batch(position_ids=position_ids, **data)
