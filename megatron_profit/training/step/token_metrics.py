"""The logged metrics of a step's tokens: sums with counts, so that no mean depends on the layout.

Megatron takes a metric as a pair and divides the sum of all first numbers by the sum of all second ones: in
an evaluation, and in the training log of a script without this project's callbacks. `as_pairs`,
`share_of_total` and `ProbQuantiles` bring metrics into this form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_profit.objectives import Objective
from megatron_profit.objectives.numerics import count_of, log1mexp
from megatron_profit.ops.linear_objective import LinearObjectiveStatistics
from megatron_profit.training.step.objective_flags import check_quantiles

# Added to counts, which can be zero, so that the mean over no token is 0 and not NaN. It vanishes next to any
# real count.
_NO_TOKEN = 1e-20

Sums = dict[str, tuple[Tensor, Tensor]]


def token_sums(statistics: LinearObjectiveStatistics, objective: Objective) -> Sums:
    """Return the metrics that follow from the statistics of a micro-batch, as (sum, count)."""
    tokens, kept = statistics.tokens, statistics.token_weight != 0
    num_supervised, num_kept = count_of(kept), kept.sum()
    prob = tokens.prob
    sums = {
        "lm loss": (-tokens.log_prob.sum(), num_supervised),
        "kept fraction": (num_kept, num_supervised),
        "mean p": (prob.sum(), num_supervised),
        "mean p kept": (prob.where(kept, 0.0).sum(), num_kept),
        "mean p dropped": (prob.where(~kept, 0.0).sum(), num_supervised - num_kept),
    }
    if "ref_log_prob" in tokens.external:
        ref_prob = tokens.ref_log_prob.exp()
        sums["mean q"] = (ref_prob.sum(), num_supervised)
        sums["mean q kept"] = (ref_prob.where(kept, 0.0).sum(), num_kept)
    if tokens.entropy is not None:
        sums["entropy"] = (tokens.entropy.sum(), num_supervised)
    return {**sums, **objective.metrics(tokens)}


def as_pairs(sums: Sums) -> dict[str, Tensor]:
    """Return each metric as [sum, count] in fp64: in fp32 a count above 2^24 would lose its last digits."""
    return {
        name: torch.stack([total.detach().double(), count.double() + _NO_TOKEN])
        for name, (total, count) in sums.items()
    }


def share_of_total(number: Tensor, parts: int) -> Tensor:
    """Return a pair whose quotient is the total of `number` over so many parts of a step, not a mean."""
    return torch.stack([number.double(), number.new_full((), 1 / parts, dtype=torch.float64)])


@dataclass
class ProbQuantiles:
    """Quantiles of p over all tokens of a step or of a whole evaluation.

    Quantiles of ranks and micro-batches cannot be averaged, so each counts its tokens in bins, and the
    counts are summed. The bins are even in log(p / (1 - p)), which resolves p near 0 and 1 alike: a quantile
    is right within 0.8 % of its odds, for p between 1e-7 and 1 - 1e-7.

    Attributes:
        quantiles: Quantiles in (0, 1).

    Raises:
        ValueError: A quantile out of range, or given twice.
    """

    BINS = 4096
    LIMIT = 16.0

    quantiles: tuple[float, ...]
    _counts: Tensor | None = field(default=None, repr=False)
    _micro_batches: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        check_quantiles(self.quantiles)

    def add(
        self, log_prob: Tensor, micro_batches: int, group: dist.ProcessGroup | None
    ) -> Mapping[str, Tensor]:
        """Count a micro-batch. The last one of a window sums the counts over the group.

        Args:
            log_prob: [M], of the supervised tokens.
            micro_batches: Calls of a window: a step, or an evaluation.
            group: Ranks that share the window's tokens.

        Returns:
            Each metric as [value, 1] at the end of a window and [0, 0] before, so that Megatron's sum over
            sum is the value.
        """
        counts = counts_in_bins(log_prob)
        if self._counts is not None:
            counts += self._counts
        self._counts = counts
        self._micro_batches += 1
        if self._micro_batches < micro_batches:
            values = torch.zeros(len(self.quantiles), 2, device=log_prob.device)
        else:
            if group is not None:
                dist.all_reduce(counts, group=group)
            values = torch.stack([_pair(counts, quantile) for quantile in self.quantiles])
            self._counts, self._micro_batches = None, 0
        return {f"p quantile {q:g}": row for q, row in zip(self.quantiles, values, strict=True)}


def counts_in_bins(log_prob: Tensor) -> Tensor:
    """Return the tokens of each bin of `ProbQuantiles`, [BINS] int64, from log p [M].

    A NaN has no place in an order and is left out.
    """
    bins_of_all, limit = ProbQuantiles.BINS, ProbQuantiles.LIMIT
    log_odds = log_prob - log1mexp(log_prob)
    position = (log_odds + limit) / (2 * limit) * bins_of_all
    bins = position.clamp(0, bins_of_all - 1).nan_to_num(bins_of_all).long()
    # Added up with one more bin for NaN: a `bincount` reads the largest bin back from the device.
    counts = bins.new_zeros(bins_of_all + 1)
    return counts.index_add_(0, bins, torch.ones_like(bins))[:bins_of_all]


def quantile_in_bins(counts: Tensor, quantile: float) -> Tensor:
    """Return log(p / (1 - p)) at a quantile of the tokens in `counts` [BINS], interpolated within a bin."""
    last, limit = ProbQuantiles.BINS - 1, ProbQuantiles.LIMIT
    below = counts.cumsum(0).double()
    rank = quantile * below[-1:]
    bin_ = torch.searchsorted(below, rank).clamp(max=last)
    of_bin = counts[bin_].double()
    inside = (rank - (below[bin_] - of_bin)) / of_bin.where(of_bin > 0, 1.0)
    return ((bin_ + inside) / ProbQuantiles.BINS * (2 * limit) - limit)[0]


def _pair(counts: Tensor, quantile: float) -> Tensor:
    """Return [value, 1] of a quantile of p; [0, 1] where there is no token."""
    value = quantile_in_bins(counts, quantile).sigmoid()
    value = torch.where(counts.sum() > 0, value, 0.0).float()
    return torch.stack([value, torch.ones_like(value)])
