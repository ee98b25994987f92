"""Partial statistics of a row's logits, and how the statistics of two parts are combined.

The same few numbers describe a block, all blocks of a rank, and all ranks. So one function combines blocks
and ranks alike (the online softmax of Milakov and Gimelshein, arXiv 1805.02867). The result is exact up to
rounding, and the order is the same on every rank.

Shapes: P parts, n rows.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

TOP_K = 20  # candidates that a part contributes to the top-20 entropy

MAX_LOGIT, REST, TARGET = range(3)


@dataclass(frozen=True)
class PartialStatistics:
    """The rows of a tensor [..., size, n] of partial statistics.

    ======================= ===========================================================
    MAX_LOGIT               m, the largest logit of the part; -inf for an empty part
    REST                    sum of exp(logit - m) over all entries but the target
    TARGET                  the target's logit, -inf where it is in another part
    entropy                 sum of exp(logit - m) * (logit - m), likewise
    sum_squared_prob        sum of exp(logit - m) ** 2, likewise
    above                   number of entries whose logit is above the target's
    lower                   sum of exp(logit - m) over entries whose logit is not, without the target
    top (20 rows)           the 20 largest logits in any order, -inf where there are fewer
    ======================= ===========================================================

    Where m is -inf, 0 takes its place in the exponents. The target joins the sums at the end: added to its
    exponential, small ones would be rounded away. For example, 1 + 1e-9 is 1 in float32. ``above`` and
    ``lower`` need the target's logit in every part, so it must be known before.

    Attributes:
        entropy: index of the field; None when it is not wanted.
        sum_squared_prob: likewise.
        above: likewise.
        lower: likewise.
        top: the slice of the 20 rows; None when they are not wanted.
        size: number of fields.
    """

    entropy: int | None
    sum_squared_prob: int | None
    above: int | None
    lower: int | None
    top: slice | None
    size: int

    @classmethod
    def of(cls, wanted: Set[str]) -> PartialStatistics:
        """Return the fields for the wanted statistics, names from ``COMPUTED_STATISTICS``."""
        size = TARGET + 1
        index: dict[str, int | None] = {}
        for name in ("entropy", "sum_squared_prob", "rank", "lower_mass"):
            index[name] = size if name in wanted else None
            size += name in wanted
        top = slice(size, size + TOP_K) if "top20_entropy" in wanted else None
        return cls(
            index["entropy"],
            index["sum_squared_prob"],
            index["rank"],
            index["lower_mass"],
            top,
            size + (TOP_K if top is not None else 0),
        )

    @property
    def compares(self) -> bool:
        """Whether a part must know the target's logit, wherever the target is."""
        return self.above is not None or self.lower is not None

    def nothing(self, num_rows: int, like: Tensor) -> Tensor:
        """Return the partial statistics [size, n] of an empty set of logits."""
        part = like.new_zeros(self.size, num_rows)
        part[MAX_LOGIT] = part[TARGET] = -torch.inf
        if self.top is not None:
            part[self.top] = -torch.inf
        return part

    def combined(self, parts: Tensor) -> Tensor:
        """Combine the parts: [P, size, n] to [size, n]."""
        if parts.size(0) == 1:
            return parts[0]
        max_logit = parts[:, MAX_LOGIT].amax(0)
        shift = parts[:, MAX_LOGIT] - finite_max(max_logit)
        factor = shift.exp()
        total = torch.empty_like(parts[0])
        total[MAX_LOGIT] = max_logit
        total[REST] = (factor * parts[:, REST]).sum(0)
        total[TARGET] = parts[:, TARGET].amax(0)
        if self.entropy is not None:
            # An empty part has factor 0; 0 * -inf would be NaN.
            shift.clamp_(min=torch.finfo(shift.dtype).min).mul_(factor)
            total[self.entropy] = (factor * parts[:, self.entropy] + shift * parts[:, REST]).sum(0)
        if self.sum_squared_prob is not None:
            total[self.sum_squared_prob] = (factor.square() * parts[:, self.sum_squared_prob]).sum(
                0
            )
        if self.above is not None:
            total[self.above] = parts[:, self.above].sum(0)
        if self.lower is not None:
            total[self.lower] = (factor * parts[:, self.lower]).sum(0)
        if self.top is not None:
            # The 20 largest of all are among the 20 largest of each part.
            total[self.top] = (
                parts[:, self.top].flatten(0, 1).topk(TOP_K, dim=0, sorted=False).values
            )
        return total

    def statistics(self, total: Tensor) -> dict[str, Tensor]:
        """Return the statistics [n] by their names in ``TokenStatistics``, from [size, n] of all logits."""
        shift = total[TARGET] - finite_max(total[MAX_LOGIT])
        target, rest = shift.exp(), total[REST]
        sum_exp = target + rest
        # A target above the rest is the largest logit: its exponential is 1. log1p keeps digits of the rest
        # that 1 + rest loses.
        log_sum = torch.where(target > rest, rest.log1p(), sum_exp.log())
        statistics = {"log_prob": shift - log_sum, "softmax_prob": target / sum_exp}
        if self.entropy is not None:
            # For a target of probability 0, 0 * -inf would be NaN.
            of_target = target * shift.clamp(min=torch.finfo(shift.dtype).min)
            statistics["entropy"] = log_sum - (total[self.entropy] + of_target) / sum_exp
        if self.sum_squared_prob is not None:
            squares = total[self.sum_squared_prob] + target.square()
            statistics["sum_squared_prob"] = squares / sum_exp.square()
        if self.above is not None:
            statistics["rank"] = 1 + total[self.above]
        if self.lower is not None:
            statistics["lower_mass"] = (total[self.lower] + target) / sum_exp
        if self.top is not None:
            statistics["top20_entropy"] = _entropy(total[self.top])
        return statistics


def sum_of_exp(total: Tensor) -> Tensor:
    """Return [n] sum of exp(logit - m) over all logits, from their partial statistics [size, n]."""
    return total[REST] + (total[TARGET] - finite_max(total[MAX_LOGIT])).exp()


def _entropy(logits: Tensor) -> Tensor:
    """Return [n] the entropy in nats of the softmax of [20, n], also if one entry has nearly all of it."""
    largest, place = logits.max(0, keepdim=True)
    shift = (logits - finite_max(largest)).clamp(min=torch.finfo(logits.dtype).min)
    others = shift.exp().scatter(0, place, 0.0)
    rest = others.sum(0)
    return rest.log1p() - (others * shift).sum(0) / (1 + rest)


def finite_max(max_logit: Tensor) -> Tensor:
    """Return ``max_logit`` with 0 for -inf, so that exp(-inf - max) is 0 and not NaN."""
    return max_logit.masked_fill(max_logit == -torch.inf, 0.0)
