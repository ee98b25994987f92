"""Importance-weighted SFT, token by token: cross-entropy weighted by how p has moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_profit.objectives.base import (
    Objective,
    ObjectiveOutput,
    TokenStatistics,
    option,
    weighted_nll,
)
from megatron_profit.objectives.checks import number_in
from megatron_profit.objectives.numerics import log_ratio
from megatron_profit.objectives.registry import register_objective


@register_objective("iw-sft")
@dataclass(frozen=True)
class ImportanceWeightedSFT(Objective):
    """L_t = -sg(clamp(p_t / p_ref_t, low, high)) log p_t; weight the clamped ratio.

    The per-token variant of https://arxiv.org/abs/2507.12856, with a frozen reference model. At the start of
    a run from the reference model the ratio is 1, so the objective is SFT.

    Attributes:
        ratio_min, ratio_max: the clamp, 0 <= ratio_min <= 1 <= ratio_max.
    """

    drops_tokens: ClassVar[bool] = False

    ratio_min: float = option("smallest weight p / p_ref, in [0, 1]", default=0.2, type=float)
    ratio_max: float = option("largest weight p / p_ref, 1 or more", default=1.8, type=float)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio_min", number_in("ratio_min", self.ratio_min, 0, 1))
        object.__setattr__(self, "ratio_max", number_in("ratio_max", self.ratio_max, 1))

    @property
    def loss_follows_prob(self) -> bool:
        return False

    @property
    def required_statistics(self) -> frozenset[str]:
        return frozenset({"ref_log_prob"})

    def evaluate(self, statistics: TokenStatistics) -> ObjectiveOutput:
        ratio = log_ratio(statistics.log_prob, statistics.ref_log_prob).exp()
        return weighted_nll(ratio.clamp(self.ratio_min, self.ratio_max), statistics)
