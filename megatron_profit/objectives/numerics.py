"""Functions of log-probabilities that stay right at p = 0 and p = 1."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def count_of(vector: Tensor) -> Tensor:
    """Return the number of entries of [N] as a scalar int64 on its device, without waiting for the device."""
    import torch

    return vector.new_full((), vector.numel(), dtype=torch.int64)


def log_ratio(log_prob: Tensor, other: Tensor) -> Tensor:
    """Return log(p / p_other) in nats; 0 where both are 0, which a difference would make NaN."""
    both_zero = log_prob.isneginf() & other.isneginf()
    return (log_prob - other).masked_fill(both_zero, 0.0)


def log1mexp(log_prob: Tensor) -> Tensor:
    """Return log(1 - p) from log p, in nats: -inf at p = 1.

    There are two ways to write it. Each loses its digits where the other keeps them (Maechler 2012,
    "Accurately computing log(1 - exp(-|a|))").
    """
    small = log_prob < -math.log(2)
    # The branch that is not taken gets a harmless input: its gradient would be NaN otherwise.
    large_part = (-log_prob.masked_fill(small, -1.0).expm1()).log()
    small_part = (-log_prob.masked_fill(~small, -1.0).exp()).log1p()
    return small_part.where(small, large_part)
