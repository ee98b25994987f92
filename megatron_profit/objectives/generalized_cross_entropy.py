"""Generalized cross-entropy: -p, its powers, and their thresholded versions."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_profit.objectives.base import ObjectiveOutput, TokenStatistics, option
from megatron_profit.objectives.checks import number_in
from megatron_profit.objectives.registry import register_objective
from megatron_profit.objectives.signals import SignalObjective
from megatron_profit.objectives.thresholds import ThresholdObjective


@register_objective("gce")
@dataclass(frozen=True)
class GeneralizedCrossEntropy(ThresholdObjective):
    """L_t = M_t (1 - p_t^q) / q, weight M_t p_t^q; M_t = 1 unless a threshold is given.

    Zhang and Sabuncu 2018 (https://arxiv.org/abs/1805.07836, equation 6) between cross-entropy
    (q -> 0) and 1 - p (q = 1). For fine-tuning it is used in https://arxiv.org/abs/2510.00526 ("Beyond Log
    Likelihood"). Its -p is q = 1, and its -p^10 is q = 10 up to the factor 1 / q. Its OnlyTopP and
    OnlyBottomP are the thresholds higher and lower.

    Attributes:
        prob_exponent: q, greater than 0.
    """

    prob_exponent: float = option(
        "the q of (1 - p^q) / q, greater than 0; near 0 it is SFT, 1 is 1 - p",
        default=1.0,
        type=float,
    )

    def __post_init__(self) -> None:
        exponent = number_in("prob_exponent", self.prob_exponent, 0, low_open=True)
        object.__setattr__(self, "prob_exponent", exponent)
        given = [
            getattr(self, field.name) for field in fields(ThresholdObjective) if not field.kw_only
        ]
        if any(value is not None for value in given):
            super().__post_init__()
        else:
            SignalObjective.__post_init__(self)

    @property
    def drops_tokens(self) -> bool:  # type: ignore[override]
        return self.threshold_direction is not None

    def evaluate_signal(self, statistics: TokenStatistics) -> ObjectiveOutput:
        scaled = self.prob_exponent * statistics.log_prob
        # expm1 keeps the digits of 1 - p^q near p = 1.
        loss, weight = -scaled.expm1() / self.prob_exponent, scaled.exp()
        if self.threshold_direction is None:
            return ObjectiveOutput(loss, weight)
        dropped = ~self.kept(statistics)
        return ObjectiveOutput(loss.masked_fill(dropped, 0), weight.masked_fill(dropped, 0))
