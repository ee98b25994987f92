"""Dynamic fine-tuning: cross-entropy weighted by the probability that the model already gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_profit.objectives.base import (
    ObjectiveOutput,
    TokenStatistics,
    weighted_nll,
)
from megatron_profit.objectives.registry import register_objective
from megatron_profit.objectives.signals import SignalObjective


@register_objective("dft")
@dataclass(frozen=True)
class DFT(SignalObjective):
    """L_t = -sg(p_t) log p_t, weight p_t.

    Equation 9 of https://arxiv.org/abs/2508.05629; the sum is divided by the unweighted count.
    Its gradient is the same as for -p_t (see ``GeneralizedCrossEntropy``); only the logged loss differs.
    On the reference signal it is PriFT-prob (see ``PriFTProb``).
    """

    drops_tokens: ClassVar[bool] = False

    def evaluate_signal(self, statistics: TokenStatistics) -> ObjectiveOutput:
        return weighted_nll(statistics.prob, statistics)
