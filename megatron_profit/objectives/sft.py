"""Supervised fine-tuning: plain cross-entropy, which every other objective reweights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_profit.objectives.base import Objective, ObjectiveOutput, TokenStatistics
from megatron_profit.objectives.registry import register_objective


@register_objective("sft")
@dataclass(frozen=True)
class SFT(Objective):
    """L_t = -log p_t, weight 1."""

    def evaluate(self, statistics: TokenStatistics) -> ObjectiveOutput:
        return ObjectiveOutput(-statistics.log_prob, torch.ones_like(statistics.log_prob))
