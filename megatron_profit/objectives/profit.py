"""ProFit: cross-entropy on the tokens whose probability under the model passes a threshold.

Equations 4-5 of https://arxiv.org/abs/2601.09195. Where the paper's text (keep p > tau) and its
released code (drop p < tau) differ, the code is followed.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_profit.objectives.base import ObjectiveOutput, TokenStatistics, weighted_nll
from megatron_profit.objectives.registry import register_objective
from megatron_profit.objectives.thresholds import ThresholdObjective


@register_objective("profit")
@dataclass(frozen=True)
class ProFit(ThresholdObjective):
    """L_t = -M_t log p_t with M_t = 1 for a kept token and 0 for a dropped one; weight M_t.

    ``ThresholdObjective`` describes the options and the direction of each threshold.

    The released code gives ``random`` a threshold tau and *drops* with probability tau:
    ``keep_fraction = 1 - tau``, so its 0.3 is ``keep_fraction=0.7`` here, which keeps 70 % of the tokens.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold_direction == "random" and self.signal_reads:
            raise ValueError(
                f"objective_signal={self.objective_signal!r} has no meaning for "
                "threshold_direction='random', which reads no probability; remove it."
            )

    def evaluate_signal(self, statistics: TokenStatistics) -> ObjectiveOutput:
        return weighted_nll(self.kept(statistics), statistics)
