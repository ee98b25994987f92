"""The result of the operation, the same for all implementations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megatron_profit.objectives import TokenStatistics


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearObjectiveStatistics(TokenStatistics):
    """Statistics of every row, without a graph; 0 where the row is not supervised.

    Attributes:
        weight: [N] the objective's weight, without ``loss_weight``; 0 for a token that it drops.
        supervised: [N] bool, rows with a label and a nonzero ``loss_weight``.
    """

    weight: Tensor
    supervised: Tensor


class LinearObjectiveOutput(NamedTuple):
    """Result of ``linear_objective``.

    Attributes:
        loss: [N] loss_weight_t * L_t in float32 (float64 for float64 inputs); exactly 0 where the
            row is not supervised.
        statistics: statistics of each token, and the weight that the objective gave it.
    """

    loss: Tensor
    statistics: LinearObjectiveStatistics
