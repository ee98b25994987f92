"""Selective language modeling: cross-entropy on the tokens with most left to learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_profit.objectives.base import TokenStatistics, option
from megatron_profit.objectives.numerics import log_ratio
from megatron_profit.objectives.ranking import RankedObjective
from megatron_profit.objectives.registry import register_objective

if TYPE_CHECKING:
    from torch import Tensor


@register_objective("rho1")
@dataclass(frozen=True)
class Rho1(RankedObjective):
    """The top share by the excess loss (-log p) - (-log p_ref); weight 1 there, else 0.

    Rho-1, https://arxiv.org/abs/2404.07965, equations 3 to 5: the reference is a model trained on clean data.
    The sum is divided by the kept tokens. 60 % are kept (70 % for the 7B model).
    """

    reference_must_differ: ClassVar[str] = (
        "ranks by what the reference knows and the model does not; against the weights that it starts from "
        "that is noise"
    )

    keep_fraction: float = option(
        "share of the supervised tokens that is trained, in (0, 1]", default=0.6, type=float
    )

    @property
    def score_statistics(self) -> frozenset[str]:
        return frozenset({"ref_log_prob"})

    def score(self, statistics: TokenStatistics) -> Tensor:
        return log_ratio(statistics.ref_log_prob, statistics.log_prob)
