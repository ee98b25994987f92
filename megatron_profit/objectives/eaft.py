"""Entropy-adaptive fine-tuning: cross-entropy weighted by the model's entropy."""

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
from megatron_profit.objectives.registry import register_objective

# About log 20, the largest entropy of 20 tokens; the authors' code divides by 3.0.
ENTROPY_SCALE = 3.0


@register_objective("eaft")
@dataclass(frozen=True)
class EAFT(Objective):
    """L_t = -sg((H20_t / 3)^alpha) log p_t, weight (H20_t / 3)^alpha.

    https://arxiv.org/abs/2601.02151; H20 is the entropy of the 20 most probable tokens, renormalised.
    A confident model is not pulled away from its own prediction; its weight can exceed 1 by a little.

    Attributes:
        entropy_exponent: alpha, greater than 0.
    """

    drops_tokens: ClassVar[bool] = False

    entropy_exponent: float = option(
        "the alpha of (H20 / 3)^alpha, greater than 0", default=1.0, type=float
    )

    def __post_init__(self) -> None:
        exponent = number_in("entropy_exponent", self.entropy_exponent, 0, low_open=True)
        object.__setattr__(self, "entropy_exponent", exponent)

    @property
    def required_statistics(self) -> frozenset[str]:
        return frozenset({"top20_entropy"})

    def evaluate(self, statistics: TokenStatistics) -> ObjectiveOutput:
        assert statistics.top20_entropy is not None
        # Rounding can leave an entropy a little below 0, whose power would be NaN.
        entropy = statistics.top20_entropy.clamp(min=0)
        return weighted_nll((entropy / ENTROPY_SCALE) ** self.entropy_exponent, statistics)
