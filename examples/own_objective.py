r"""An example of a user's objective: focal loss, which trains the tokens that the model finds improbable.

    PYTHONPATH=examples torchrun ... -m megatron_profit.sft ... \
        --objective own_objective:FocalLoss --focal-gamma 2

A package makes it available as `--objective focal` with an entry point:

    entry_points={"megatron_profit.objectives": ["focal = own_objective:FocalLoss"]}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_profit.objectives import Objective, ObjectiveOutput, TokenStatistics, option


@dataclass(frozen=True)
class FocalLoss(Objective):
    """L = -(1 - p)^gamma log p; weight (1 - p)^gamma - gamma p (1 - p)^(gamma - 1) log p.

    https://arxiv.org/abs/1708.02002. The factor is differentiated too, so the weight is not the factor.

    Attributes:
        focal_gamma: At least 1; 0 would be plain cross-entropy.
    """

    drops_tokens: ClassVar[bool] = False

    # The field is also an option of build_objective and the flag --focal-gamma.
    focal_gamma: float = option("gamma of the focal loss, at least 1", default=2.0, type=float)

    def __post_init__(self) -> None:
        if not self.focal_gamma >= 1:
            raise ValueError(f"focal_gamma {self.focal_gamma!r} is below 1; give at least 1.")

    def evaluate(self, statistics: TokenStatistics) -> ObjectiveOutput:
        # p log p is 0 at p = 0, where log p is infinite.
        log_prob = statistics.log_prob.clamp(min=-1e4)
        prob, rest = log_prob.exp(), -torch.expm1(log_prob)
        gamma = self.focal_gamma
        weight = rest**gamma - gamma * prob * rest ** (gamma - 1) * log_prob
        return ObjectiveOutput(-(rest**gamma) * log_prob, weight)
