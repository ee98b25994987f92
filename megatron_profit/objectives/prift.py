"""PriFT: cross-entropy that is weighted or masked by the model before fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_profit.objectives.base import ObjectiveOutput, TokenStatistics, option, weighted_nll
from megatron_profit.objectives.checks import number_in
from megatron_profit.objectives.dft import DFT
from megatron_profit.objectives.registry import register_objective
from megatron_profit.objectives.signals import SignalObjective, signal_option


@register_objective("prift-prob")
@dataclass(frozen=True)
class PriFTProb(DFT):
    """L_t = -q_t log p_t with q_t = p_ref_t; weight q_t.

    PriFT-prob of https://arxiv.org/abs/2606.09396: ``dft`` whose signal is the frozen reference model. It has
    a name of its own because the paper has; with ``objective_signal="current"`` it is ``dft``.
    """

    objective_signal: str = signal_option("reference")


@register_objective("prift-mass")
@dataclass(frozen=True)
class PriFTMass(SignalObjective):
    """L_t = -M_t log p_t with M_t = 1[u_t >= least], u_t = sum of q_v over all v with q_v <= q_t; weight M_t.

    PriFT-mass of https://arxiv.org/abs/2606.09396. q is the distribution of the frozen reference model and
    q_t the target's probability in it. u is near 1 where the target is among the most probable tokens,
    however small its probability is. For example, q = (0.4, 0.35, 0.25) with the second as the target gives
    u = 0.6. With ``objective_signal="current"`` u is the lower mass under the model in training.

    Attributes:
        mass_threshold: the least lower mass of a kept token, in [0, 1].
    """

    signal_statistics: ClassVar[tuple[str, ...]] = ("lower_mass",)

    objective_signal: str = signal_option("reference")
    mass_threshold: float = option(
        "a token is kept when the tokens that are no more probable than it have at least this much "
        "probability together, in [0, 1]",
        default=0.5,
        type=float,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        threshold = number_in("mass_threshold", self.mass_threshold, 0, 1)
        object.__setattr__(self, "mass_threshold", threshold)

    @property
    def own_statistics(self) -> frozenset[str]:
        return frozenset(self.signal_statistics)

    def evaluate_signal(self, statistics: TokenStatistics) -> ObjectiveOutput:
        assert statistics.lower_mass is not None
        # Not `>=`: a NaN is kept, so that it shows.
        return weighted_nll(~(statistics.lower_mass < self.mass_threshold), statistics)
