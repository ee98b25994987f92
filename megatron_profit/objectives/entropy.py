"""Entropy selection: cross-entropy on the tokens where the model is least certain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_profit.objectives.base import TokenStatistics, option
from megatron_profit.objectives.ranking import RankedObjective
from megatron_profit.objectives.registry import register_objective

if TYPE_CHECKING:
    from torch import Tensor


@register_objective("entropy")
@dataclass(frozen=True)
class Entropy(RankedObjective):
    """The top share by the entropy H of the predicted distribution; weight 1 there, else 0.

    https://arxiv.org/abs/2506.01939 ("Beyond the 80/20 rule") selects 20 % for reinforcement
    learning; ProFit (arXiv 2601.09195) uses it as a baseline for fine-tuning, ranks within a
    micro-batch and divides by the kept tokens.
    """

    keep_fraction: float = option(
        "share of the supervised tokens that is trained, in (0, 1]", default=0.2, type=float
    )

    @property
    def score_statistics(self) -> frozenset[str]:
        return frozenset({"entropy"})

    def score(self, statistics: TokenStatistics) -> Tensor:
        assert statistics.entropy is not None
        return statistics.entropy
