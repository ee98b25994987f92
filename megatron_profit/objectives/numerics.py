"""Functions of log-probabilities that stay right at p = 0 and p = 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_ratio(log_prob: Tensor, other: Tensor) -> Tensor:
    """Return log(p / p_other) in nats; 0 where both are 0, which a difference would make NaN."""
    both_zero = log_prob.isneginf() & other.isneginf()
    return torch.where(both_zero, torch.zeros_like(log_prob), log_prob - other)


def log1mexp(log_prob: Tensor) -> Tensor:
    """Return log(1 - p) from log p, in nats: -inf at p = 1.

    There are two ways to write it. Each loses its digits where the other keeps them (Maechler 2012,
    "Accurately computing log(1 - exp(-|a|))").
    """
    small = log_prob < -math.log(2)
    # The branch that is not taken gets a harmless input: its gradient would be NaN otherwise.
    large_part = torch.log(-torch.expm1(log_prob.masked_fill(small, -1.0)))
    small_part = torch.log1p(-torch.exp(log_prob.masked_fill(~small, -1.0)))
    return torch.where(small, small_part, large_part)
