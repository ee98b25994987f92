"""The training entry with an objective that fails when it is told to, as a broken kernel would."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from megatron_profit import sft
from megatron_profit.objectives import (
    Objective,
    ObjectiveOutput,
    TokenStatistics,
    option,
    register_objective,
)


@register_objective("faulty")
@dataclass(frozen=True)
class Faulty(Objective):
    """Plain SFT but for some steps, counted from 1; what is not finite comes from the last rank only."""

    nan_loss: int = option("the step whose loss is NaN", default=0, type=int)
    nan_gradient: int = option("the step whose gradient is NaN", default=0, type=int)
    keep_nothing: int = option("the first step that keeps no token", default=10**9, type=int)

    def evaluate(self, statistics: TokenStatistics) -> ObjectiveOutput:
        from megatron.training import get_args

        step = get_args().curr_iteration + 1
        is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        loss, weight = -statistics.log_prob, torch.ones_like(statistics.log_prob)
        if step >= self.keep_nothing:
            return ObjectiveOutput(0 * loss, 0 * weight)
        if is_last and step == self.nan_loss:
            loss = loss * torch.nan
        if is_last and step == self.nan_gradient:
            weight = weight * torch.nan
        return ObjectiveOutput(loss, weight)


if __name__ == "__main__":
    sft.main()
