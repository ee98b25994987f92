"""InfoSFT: cross-entropy weighted towards tokens that the model half knows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_profit.objectives.base import ObjectiveOutput, TokenStatistics, option, weighted_nll
from megatron_profit.objectives.checks import number_in
from megatron_profit.objectives.numerics import log1mexp
from megatron_profit.objectives.registry import register_objective
from megatron_profit.objectives.signals import SignalObjective


@register_objective("infosft")
@dataclass(frozen=True)
class InfoSFT(SignalObjective):
    """L_t = -w_t log p_t with w_t = sg(p_t relu(1 - logit(p_t) / logit(P))), logit(x) = log(x / (1 - x)).

    https://arxiv.org/abs/2605.14967. The weight is 0 from p = P on, p itself at p = 1/2, and falls to 0 with
    p: neither a known token nor a very improbable one is trained.

    Attributes:
        known_prob: P, in (0.5, 1).

    Raises:
        ValueError: a value out of range.
    """

    known_prob: float = option(
        "probability from which on a token counts as known and is not trained, above 0.5 and below 1",
        default=0.93,
        type=float,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = number_in("known_prob", self.known_prob, 0.5, 1, low_open=True)
        if known == 1:
            raise ValueError("known_prob is 1, whose logit is infinite; give a number below 1.")
        object.__setattr__(self, "known_prob", known)

    def evaluate_signal(self, statistics: TokenStatistics) -> ObjectiveOutput:
        log_prob = statistics.log_prob.detach()
        log_odds = log_prob - log1mexp(log_prob)
        limit = math.log(self.known_prob / (1 - self.known_prob))
        weight = statistics.prob * (1 - log_odds / limit).clamp(min=0)
        # 0 * inf is NaN; p log p vanishes there.
        return weighted_nll(weight.masked_fill(log_prob.isneginf(), 0.0), statistics)
