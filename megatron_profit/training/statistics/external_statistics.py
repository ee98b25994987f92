"""Statistics that an objective reads and that the forward pass of a single micro-batch cannot compute.

`ExternalStatistics` begins each micro-batch of a run with them. Their providers are callbacks of the loop, so
that they have them in time.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from checkpoint_conversion.hf.model import HFModel
from megatron_profit.data import SFTDataset
from megatron_profit.megatron_patches.callbacks import Callback
from megatron_profit.objectives import TokenStatistics
from megatron_profit.training.step.batch import Batch
from megatron_profit.training.step.objective_loss import MicroBatchLoss, ObjectiveLoss

if TYPE_CHECKING:
    from megatron_profit.training.statistics.lookahead_pass import LookaheadPass


@dataclass(frozen=True)
class RunParts:
    """The parts of a run that a provider can be made from.

    Attributes:
        args: Megatron's arguments.
        loss: The loss of the run; `loss.objective.final` has the options of the objective.
        lookahead_pass: Computes statistics of rows before they are trained.
        datasets: Rows of the data by name, "train" and "valid".
        data_digest: Digest of the training data.
        reference: The reference model and the folder of its log-probabilities, if it is needed.
    """

    args: Namespace
    loss: ObjectiveLoss
    lookahead_pass: LookaheadPass
    datasets: Mapping[str, SFTDataset]
    data_digest: str
    reference: tuple[HFModel, Path] | None


class StatisticProvider(Callback, ABC):
    """Provides a statistic that an objective reads and the kernel cannot compute.

    Attributes:
        statistic: Its name in `TokenStatistics`.
        flags: Arguments that only this provider reads, each with the objectives that it is for, in words.
        recorded: Arguments that a resumed run must not change.
        in_evaluation: Whether an evaluation can have the statistic.
    """

    statistic: str
    flags: ClassVar[Mapping[str, str]] = {}
    recorded: ClassVar[tuple[str, ...]] = ()
    in_evaluation: ClassVar[bool] = True

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """Check the arguments, by name, before anything is loaded.

        Raises:
            ValueError: Names the flag, its value and what to do.
        """

    @classmethod
    def from_run(cls, run: RunParts) -> StatisticProvider:
        """Return the provider of a run, before the model exists; by default one made from no parts.

        It may be of another class that gives the same statistic.
        """
        return cls()

    def observe(self, tokens: TokenStatistics) -> None:
        """Act on the supervised tokens of a training micro-batch, after its forward pass."""

    @abstractmethod
    def of(self, batch: Batch, data: str) -> Tensor | None:
        """Return the statistic [B, S] of a micro-batch of the data set `data`, "train" or "valid".

        It is read where `batch.labels` is not -100. It is None on pipeline stages that compute no loss.
        """


def statistics_of(
    providers: Sequence[StatisticProvider], names: Set[str], batch: Batch, data: str
) -> dict[str, Tensor]:
    """Return the wanted statistics [B, S] of a micro-batch by name, as far as they are provided here."""
    wanted = (provider for provider in providers if provider.statistic in names)
    found = {provider.statistic: provider.of(batch, data) for provider in wanted}
    return {name: values for name, values in found.items() if values is not None}


@dataclass(frozen=True)
class ExternalStatistics:
    """Begins the micro-batches of a run.

    Attributes:
        loss: The loss of the run.
        providers: One for each external statistic that its objective requires; the run registers them as
            callbacks.
        observers: See each micro-batch of training or evaluation when its statistics are known, on the last
            pipeline stage.
    """

    loss: ObjectiveLoss
    providers: Sequence[StatisticProvider]
    observers: Sequence[Callable[[Batch, MicroBatchLoss], None]] = ()

    def begin(self, batch: Batch) -> MicroBatchLoss:
        """Begin a micro-batch of training or evaluation."""
        data = "train" if torch.is_grad_enabled() else "valid"
        names = self.loss.current_objective.required_statistics | self.loss.logged_statistics
        external = statistics_of(self.providers, names, batch, data)
        observe = functools.partial(self._observe, batch)
        return self.loss.micro_batch(batch.draw_index, batch.position_ids, external, observe)

    def _observe(self, batch: Batch, loss: MicroBatchLoss) -> None:
        if torch.is_grad_enabled():
            for provider in self.providers:
                provider.observe(loss.statistics.tokens)
        for observer in self.observers:
            observer(batch, loss)
