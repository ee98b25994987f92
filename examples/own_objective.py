r"""Two examples of a user's objective.

`FocalLoss` trains the tokens that the model finds improbable:

    PYTHONPATH=examples torchrun ... -m megatron_profit.sft ... \
        --objective own_objective:FocalLoss --focal-gamma 2

`RareTokens` reads a statistic of its own, the frequency of a token in the training data, and names the class
that provides it in a training run (`own_statistic.py`).

A package makes it available as `--objective focal` with an entry point:

    entry_points={"megatron_profit.objectives": ["focal = own_objective:FocalLoss"]}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_profit.objectives import (
    Objective,
    ObjectiveOutput,
    TokenStatistics,
    option,
    weighted_nll,
)


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


@dataclass(frozen=True)
class RareTokens(Objective):
    """L = -w log p, w = min(1, sqrt(t / f)), f the target's share among the supervised tokens of the data.

    The weight is the probability with which word2vec keeps a frequent word (https://arxiv.org/abs/1310.4546,
    equation 5).

    Attributes:
        frequency_threshold: t, greater than 0. Tokens that are rarer have the weight 1.
    """

    drops_tokens: ClassVar[bool] = False
    providers: ClassVar[Mapping[str, str]] = {"target_frequency": "own_statistic:TargetFrequency"}

    frequency_threshold: float = option(
        "the share of a token in the data from which on it gets less weight, greater than 0",
        default=1e-3,
        type=float,
    )

    def __post_init__(self) -> None:
        if not self.frequency_threshold > 0:
            raise ValueError(
                f"frequency_threshold {self.frequency_threshold!r} is not above 0; give more than 0."
            )

    @property
    def required_statistics(self) -> frozenset[str]:
        return frozenset({"target_frequency"})

    def evaluate(self, statistics: TokenStatistics) -> ObjectiveOutput:
        # A token that the data lack has the frequency 0, and so the weight 1.
        weight = (self.frequency_threshold / statistics.target_frequency).sqrt().clamp(max=1)
        return weighted_nll(weight, statistics)
