"""Quantiles of log-probabilities as thresholds."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# The statistics that hold thresholds: the least log p that is kept, and the largest.
MIN_LOG_PROB, MAX_LOG_PROB = "min_log_prob", "max_log_prob"


def quantile_bound(bound: str, log_prob: Tensor, quantile: float) -> Tensor:
    """Return the threshold that a quantile of n >= 1 tokens gives, a scalar in nats.

    ============ ===================================================================
    min_log_prob the floor(quantile * n) least probable tokens fall below it
    max_log_prob the ceil(quantile * n) least probable tokens do not exceed it
    ============ ===================================================================

    At least one token is kept. The threshold lies halfway between two tokens, so that a p that is computed
    once more, and rounded otherwise, falls on the same side. Tokens of equal p are kept together.

    For example, the probabilities 0.1, 0.2, 0.3, 0.4 and the quantile 0.25 give the ``min_log_prob`` of
    about 0.14, which keeps three of them.

    Args:
        bound: min_log_prob or max_log_prob.
        log_prob: [n] in nats; a NaN counts as the highest.
        quantile: in [0, 1].
    """
    count = log_prob.numel()
    share = Fraction(repr(quantile)) * count
    ranked = log_prob.sort().values
    if bound == MIN_LOG_PROB:
        dropped = min(math.floor(share), count - 1)
        if dropped == 0:
            return log_prob.new_full((), -math.inf)
        outer, kept = ranked[dropped - 1], ranked[dropped]
    else:
        num_kept = max(math.ceil(share), 1)
        if num_kept == count:
            return ranked[-1].clamp(min=0.0)
        kept, outer = ranked[num_kept - 1], ranked[num_kept]
    middle = (outer + kept) / 2
    # The middle of two neighbouring numbers, or of -inf and another, may be the one that is dropped.
    return kept.where(middle == outer, middle)


def bounds_of_groups(bound: str, log_prob: Tensor, quantile: float, sizes: list[int]) -> Tensor:
    """Return [N] ``quantile_bound`` of each token's group; the groups follow each other with these sizes."""
    import torch

    parts = [
        quantile_bound(bound, part, quantile).expand(len(part))
        for part in log_prob.split(sizes)
        if len(part)
    ]
    return torch.cat(parts) if parts else log_prob.new_empty(0)


def record_sizes(record: Tensor) -> list[int]:
    """Return the number of tokens of each record in ``record`` [N]; a record's tokens stand together."""
    return record.unique_consecutive(return_counts=True)[1].tolist()
