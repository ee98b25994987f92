"""Dynamic entropy fine-tuning: generalized cross-entropy whose exponent is the model's certainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_profit.objectives.base import ObjectiveOutput, TokenStatistics
from megatron_profit.objectives.registry import register_objective
from megatron_profit.objectives.signals import SignalObjective


@register_objective("deft")
@dataclass(frozen=True)
class DEFT(SignalObjective):
    """L_t = (1 - p_t^a) / a with a = sg(sum_v p_v^2), weight p_t^a.

    https://arxiv.org/abs/2602.11424: cross-entropy where the model is uncertain (a near 0), 1 - p
    where it is certain (a near 1). Its code divides by a + 1e-6, which is left out here. The
    exponent is the current model's on either signal.
    """

    drops_tokens: ClassVar[bool] = False

    @property
    def loss_follows_prob(self) -> bool:
        return True

    @property
    def own_statistics(self) -> frozenset[str]:
        return frozenset({"sum_squared_prob"})

    def evaluate_signal(self, statistics: TokenStatistics) -> ObjectiveOutput:
        assert statistics.sum_squared_prob is not None
        exponent = statistics.sum_squared_prob.detach()
        scaled = exponent * statistics.log_prob
        return ObjectiveOutput(-scaled.expm1() / exponent, scaled.exp())
