"""Statistics that an objective reads and that the forward pass of a single micro-batch cannot compute.

`GivenStatistics` begins each micro-batch of a run with them. Their providers are callbacks of the loop, so
that they have them in time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_profit.megatron_patches.callbacks import Callback
from megatron_profit.objectives import (
    Objective,
    RankedObjective,
    ScheduledObjective,
    build_objective,
)
from megatron_profit.training.step.batch import Batch
from megatron_profit.training.step.objective_loss import MicroBatchLoss, ObjectiveLoss


class StatisticProvider(Callback, ABC):
    """Provides a statistic that an objective reads and the kernel cannot compute.

    Attributes:
        statistic: Its name in `TokenStatistics`.
    """

    statistic: str

    @abstractmethod
    def of(self, batch: Batch) -> Tensor | None:
        """Return the statistic [B, S] of a micro-batch; None on pipeline stages that compute no loss."""


@dataclass(frozen=True)
class GivenStatistics:
    """Begins the micro-batches of a run.

    Attributes:
        loss: The loss of the run.
        providers: One for each given statistic that its objective requires; the run registers them as
            callbacks.
    """

    loss: ObjectiveLoss
    providers: Sequence[StatisticProvider]

    def begin(self, batch: Batch) -> MicroBatchLoss:
        """Begin a micro-batch of training or evaluation."""
        loss, required = self.loss, self.loss.current_objective.required_statistics
        if "old_log_prob" in required and not torch.is_grad_enabled():
            # In an evaluation the old policy is the current one, so PSFT is plain SFT.
            loss, required = replace(loss, objective=build_objective("sft")), frozenset()
        given = {
            provider.statistic: values
            for provider in self.providers
            if provider.statistic in required and (values := provider.of(batch)) is not None
        }
        return loss.micro_batch(batch.sample_index, batch.position_ids, given)


def needed_statistics(objective: Objective | ScheduledObjective) -> frozenset[str]:
    """Return the statistics that an objective reads, or that its ranking over the global batch reads."""
    final = objective.objective if isinstance(objective, ScheduledObjective) else objective
    required = final.required_statistics
    if isinstance(final, RankedObjective) and "selected" in required:
        required |= final.score_statistics
    return required
