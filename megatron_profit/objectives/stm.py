"""Selective token masking: cross-entropy on the tokens that the base model found plausible."""

from __future__ import annotations

import operator
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
from megatron_profit.objectives.thresholds import strictly_beyond


@register_objective("stm")
@dataclass(frozen=True)
class STM(Objective):
    """L_t = -M_t log p_t with M_t = 1[p_ref_t >= tau]; weight M_t.

    https://arxiv.org/abs/2501.14315: the mask comes from a frozen model and never changes. Its
    perplexity threshold of 2.5 is the probability 0.4. Masked labels leave its mean altogether, so
    the divisor is the kept tokens. It is ``profit`` on the reference signal with the threshold 0.4, the
    direction higher and that divisor.

    Attributes:
        ref_prob_threshold: tau, in [0, 1].
    """

    normalization: ClassVar[str] = "kept"

    ref_prob_threshold: float = option(
        "a token is dropped when the reference model gives it less probability, in [0, 1]",
        default=0.4,
        type=float,
    )

    def __post_init__(self) -> None:
        threshold = number_in("ref_prob_threshold", self.ref_prob_threshold, 0, 1)
        object.__setattr__(self, "ref_prob_threshold", threshold)

    @property
    def required_statistics(self) -> frozenset[str]:
        return frozenset({"ref_log_prob"})

    def evaluate(self, statistics: TokenStatistics) -> ObjectiveOutput:
        ref = statistics.ref_log_prob
        dropped = strictly_beyond(operator.lt, ref.exp(), ref, self.ref_prob_threshold)
        return weighted_nll(~dropped, statistics)
