"""TALR: cross-entropy weighted by a power of p that follows from how hard the batch is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_profit.objectives.base import ObjectiveOutput, TokenStatistics, option, weighted_nll
from megatron_profit.objectives.checks import number_in
from megatron_profit.objectives.numerics import count_of
from megatron_profit.objectives.quantiles import record_sizes
from megatron_profit.objectives.registry import register_objective
from megatron_profit.objectives.signals import SignalObjective

if TYPE_CHECKING:
    from torch import Tensor


@register_objective("talr")
@dataclass(frozen=True)
class TALR(SignalObjective):
    """L_t = -w_t log p_t with w_t = sg(max(p_t^(1/T), least)), T = the median of the records' mean -log p.

    Token-adaptive loss reweighting, https://arxiv.org/abs/2509.20758. T is the statistic ``median_loss``, of
    the whole global batch: ``look_ahead`` computes it from all tokens. Of an even number of records the
    median is the mean of the two in the middle.

    Attributes:
        least_weight: the smallest weight, in (0, 1].
    """

    drops_tokens: ClassVar[bool] = False

    least_weight: float = option(
        "the smallest weight of a token, in (0, 1]", default=0.01, type=float
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        least = number_in("least_weight", self.least_weight, 0, 1, low_open=True)
        object.__setattr__(self, "least_weight", least)

    @property
    def loss_follows_prob(self) -> bool:
        # The exponent 1 / T holds the weights against a model that is worse on all records.
        return True

    @property
    def own_statistics(self) -> frozenset[str]:
        return frozenset({"median_loss"})

    @property
    def lookahead(self) -> Mapping[str, frozenset[str]]:
        return {"median_loss": self.signal_reads}

    def look_ahead(self, statistics: TokenStatistics) -> Mapping[str, Tensor]:
        """Return ``median_loss``, the same number for every token."""
        import torch

        loss = -self.seen(statistics).log_prob.detach()
        if not len(loss):
            return {"median_loss": loss}
        means = torch.stack([part.mean() for part in loss.split(record_sizes(statistics.record))])
        ranked = means.sort().values
        median = (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2
        return {"median_loss": median.expand_as(loss)}

    def evaluate_signal(self, statistics: TokenStatistics) -> ObjectiveOutput:
        # At T = 0 every token is certain: p^(1/T) is 1, and 0 / 0 would be NaN.
        log_weight = (statistics.log_prob.detach() / statistics.median_loss).masked_fill(
            statistics.log_prob == 0, 0.0
        )
        return weighted_nll(log_weight.exp().clamp(min=self.least_weight), statistics)

    def metrics(self, statistics: TokenStatistics) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return T."""
        return {"median loss": (statistics.median_loss.sum(), count_of(statistics.log_prob))}
