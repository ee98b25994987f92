"""CHORD's token weight: cross-entropy where the model is neither sure nor far off."""

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


@register_objective("chord-phi")
@dataclass(frozen=True)
class ChordPhi(SignalObjective):
    """L_t = -sg(p_t (1 - p_t)) log p_t, weight p_t (1 - p_t), at most 1/4.

    The phi of https://arxiv.org/abs/2508.11408, which there weights the supervised part of a
    reinforcement-learning loss; here it stands alone.
    """

    drops_tokens: ClassVar[bool] = False

    def evaluate_signal(self, statistics: TokenStatistics) -> ObjectiveOutput:
        one_minus_prob = -statistics.log_prob.expm1()
        return weighted_nll(statistics.prob * one_minus_prob, statistics)
