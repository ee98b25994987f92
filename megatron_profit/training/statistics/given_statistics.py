"""Statistics that an objective reads and that the forward pass of a single micro-batch cannot compute.

`GivenStatistics` begins each micro-batch of a run with them. It listens to Megatron's loop to have them in
time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_profit.megatron_patches.hooks import RunListener, Trained
from megatron_profit.objectives import (
    Objective,
    RankedObjective,
    ScheduledObjective,
    build_objective,
)
from megatron_profit.training.step.batch import Batch
from megatron_profit.training.step.objective_loss import MicroBatchLoss, ObjectiveLoss


class Source(RunListener, Protocol):
    """The source of one of the given statistics."""

    statistic: str

    def of(self, batch: Batch) -> Tensor | None:
        """Return [B, S] of a micro-batch; None on pipeline stages that compute no loss."""


@dataclass(frozen=True)
class GivenStatistics(RunListener):
    """Begins the micro-batches of a run.

    Attributes:
        loss: The loss of the run.
        sources: One for each given statistic that its objective requires.
    """

    loss: ObjectiveLoss
    sources: Sequence[Source]

    def begin(self, batch: Batch) -> MicroBatchLoss:
        """Begin a micro-batch of training or evaluation."""
        loss, required = self.loss, self.loss.current_objective.required_statistics
        if "old_log_prob" in required and not torch.is_grad_enabled():
            # In an evaluation the old policy is the current one, so PSFT is plain SFT.
            loss, required = replace(loss, objective=build_objective("sft")), frozenset()
        given = {
            source.statistic: values
            for source in self.sources
            if source.statistic in required and (values := source.of(batch)) is not None
        }
        return loss.micro_batch(batch.sample_index, batch.position_ids, given)

    def before_train_step(self, trained: Trained, iteration: int) -> None:
        for source in self.sources:
            source.before_train_step(trained, iteration)

    def before_evaluation(self, trained: Trained) -> None:
        for source in self.sources:
            source.before_evaluation(trained)

    def with_checkpoint(self, folder: Path, iteration: int) -> None:
        for source in self.sources:
            source.with_checkpoint(folder, iteration)


def needed_statistics(objective: Objective | ScheduledObjective) -> frozenset[str]:
    """Return the statistics that an objective reads, or that its ranking over the global batch reads."""
    final = objective.objective if isinstance(objective, ScheduledObjective) else objective
    required = final.required_statistics
    if isinstance(final, RankedObjective) and "selected" in required:
        required |= final.score_statistics
    return required
