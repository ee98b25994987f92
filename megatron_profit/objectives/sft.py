"""Supervised fine-tuning: plain cross-entropy, which every other objective reweights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_profit.objectives.base import (
    Objective,
    ObjectiveOutput,
    TokenStatistics,
    weighted_nll,
)
from megatron_profit.objectives.registry import register_objective


@register_objective("sft")
@dataclass(frozen=True)
class SFT(Objective):
    """L_t = -log p_t, weight 1."""

    drops_tokens: ClassVar[bool] = False

    def evaluate(self, statistics: TokenStatistics) -> ObjectiveOutput:
        log_prob = statistics.log_prob
        return weighted_nll(log_prob.new_ones(log_prob.shape), statistics)
