"""Forward-only passes over rows that are trained later, through Megatron's own schedules.

Some objectives need facts before a token is trained that the forward pass of its micro-batch cannot give. For
example, they need its rank in the whole global batch, or its probability under an older model. Rows are a
pure function of their number, so a pass makes its own micro-batches and never touches Megatron's data
iterators.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training import get_args
from megatron.training.training import (
    disable_forward_pre_hook,
    enable_forward_pre_hook,
    should_disable_forward_pre_hook,
)
from torch import Tensor
from torch.utils.data import default_collate

from megatron_profit.data import SFTDataset
from megatron_profit.megatron_patches.callbacks import TrainContext
from megatron_profit.objectives import StatisticsOnly
from megatron_profit.training.statistics.external_statistics import (
    StatisticProvider,
    statistics_of,
)
from megatron_profit.training.statistics.token_table import TokenTable, token_keys
from megatron_profit.training.step.batch import Batch
from megatron_profit.training.step.forward_step import make_forward_step
from megatron_profit.training.step.objective_loss import MicroBatchLoss, ObjectiveLoss


@dataclass(frozen=True)
class RowRange:
    """Rows of a data set in the order in which Megatron's sampler deals them out.

    Attributes:
        dataset: Gives row i for the same i on every rank.
        start, stop: The rows; as many as whole micro-batches of all data-parallel ranks take.
        micro_batch_size: Rows of a micro-batch.

    Raises:
        ValueError: A micro-batch would not be full.
    """

    dataset: SFTDataset
    start: int
    stop: int
    micro_batch_size: int

    def __post_init__(self) -> None:
        if (self.stop - self.start) % self._stride:
            raise ValueError(
                f"{self.stop - self.start} rows are no multiple of {self._stride}, the micro-batch "
                f"size {self.micro_batch_size} times the data-parallel size"
            )

    @property
    def _stride(self) -> int:
        return self.micro_batch_size * mpu.get_data_parallel_world_size()

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of each rank."""
        return (self.stop - self.start) // self._stride

    def micro_batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's micro-batches."""
        shift = mpu.get_data_parallel_rank() * self.micro_batch_size
        for first in range(self.start + shift, self.stop, self._stride):
            yield default_collate(
                [self.dataset[i] for i in range(first, first + self.micro_batch_size)]
            )


class _ScoredBatch:
    """Keeps the statistics of a micro-batch's supervised tokens."""

    def __init__(self, keys: Tensor, loss: MicroBatchLoss, names: frozenset[str]) -> None:
        self._keys, self._loss, self._names = keys, loss, names

    @property
    def model_kwargs(self) -> dict[str, Any]:
        return self._loss.model_kwargs

    def loss_func(self, output_tensor: Tensor, non_loss_data: bool) -> TokenTable:
        """Return the table that a schedule collects with `collect_non_loss_data`."""
        statistics = self._loss.statistics
        keys = statistics.rows.take(self._keys.t().flatten())
        return TokenTable(keys, {n: vars(statistics.tokens)[n] for n in sorted(self._names)})


def keys_of(batch: Batch) -> Tensor:
    """Return [B, S] int64, the key by which each token of a micro-batch is found."""
    return token_keys(batch.draw_index, batch.position_ids)


def values_in(table: TokenTable | None, name: str, batch: Batch) -> Tensor | None:
    """Return [B, S] of a micro-batch's supervised tokens, 0 elsewhere; None without a table."""
    return None if table is None else table.look_up(name, keys_of(batch), batch.labels != -100)


def micro_batch_multiple(context: TrainContext) -> int:
    """Return the number of which a pass's micro-batches should be a multiple; 1 without a virtual pipeline.

    The interleaved schedule takes micro-batches in groups. It refuses fewer than a group, and a last group
    that is smaller than the pipeline.
    """
    return context.config.microbatch_group_size_per_vp_stage if len(context.model) > 1 else 1


def data_group() -> dist.ProcessGroup:
    """Return the ranks over which the tokens of a global batch are spread."""
    return mpu.get_data_parallel_group(with_context_parallel=True)


class LookaheadPass:
    """Computes statistics of rows of the run's data sets under the current weights.

    Args:
        loss: The loss of the run.

    Attributes:
        providers: Give the statistics that the kernel cannot compute.
    """

    def __init__(self, loss: ObjectiveLoss) -> None:
        self._loss = loss
        self.providers: list[StatisticProvider] = []
        self._train: SFTDataset | None = None
        self._valid: SFTDataset | None = None

    def watching(self, provider: Callable) -> Callable:
        """Wrap a data set provider of Megatron, so that this object sees the data sets."""

        @functools.wraps(provider)
        def provide(*args: Any, **kwargs: Any) -> tuple:
            datasets = provider(*args, **kwargs)
            self._train, self._valid, _ = datasets
            return datasets

        return provide

    def of_next_batches(
        self, context: TrainContext, count: int, statistics: frozenset[str]
    ) -> TokenTable | None:
        """Return statistics of the supervised tokens of the next `count` global batches.

        All ranks call it. Weights, gradients, random numbers and Megatron's data iterators stay unchanged.

        Args:
            context: The model in training.
            count: Global batches of the current size.
            statistics: Names of vectors of `TokenStatistics`.

        Returns:
            The tokens of this data-parallel rank on the last pipeline stage, None on the others.
        """
        args = get_args()
        assert self._train is not None, "the data sets are not built"
        size, start = get_current_running_global_batch_size(), args.consumed_train_samples
        micro_batches = size // (args.micro_batch_size * mpu.get_data_parallel_world_size())
        # The schedule of a step takes the micro-batches of one global batch, but perhaps not of several.
        divides = micro_batches % micro_batch_multiple(context) == 0
        length = count * size if divides else size
        starts = range(start, start + count * size, length)
        parts = [RowRange(self._train, at, at + length, args.micro_batch_size) for at in starts]
        return _joined([self._of(context, part, statistics, "train") for part in parts])

    def of_valid_batch(
        self, context: TrainContext, number: int, statistics: frozenset[str]
    ) -> TokenTable | None:
        """Return the same for one global batch of each evaluation, counted from 0."""
        args = get_args()
        assert self._valid is not None, "there are no validation data"
        start = number * args.eval_global_batch_size
        stop = start + args.eval_global_batch_size
        rows = RowRange(self._valid, start, stop, args.eval_micro_batch_size)
        return self._of(context, rows, statistics, "valid")

    def of_valid_batches(
        self, context: TrainContext, statistics: frozenset[str]
    ) -> list[TokenTable | None]:
        """Return the same for each global batch of an evaluation."""
        batches = range(get_args().eval_iters)
        return [self.of_valid_batch(context, number, statistics) for number in batches]

    def _of(
        self, context: TrainContext, rows: RowRange, statistics: frozenset[str], name: str
    ) -> TokenTable | None:
        def external(batch: Batch) -> Mapping[str, Tensor]:
            return statistics_of(self.providers, statistics, batch, name)

        return score_rows(context, rows, statistics, self._loss, keys_of, external)


def _joined(tables: Sequence[TokenTable | None]) -> TokenTable | None:
    """Return the tokens of several passes; None on ranks whose passes have none."""
    found = [table for table in tables if table is not None]
    return TokenTable.joined(found) if found else None


def score_rows(
    context: TrainContext,
    rows: RowRange,
    statistics: frozenset[str],
    loss: ObjectiveLoss,
    keys: Callable[[Batch], Tensor],
    external: Callable[[Batch], Mapping[str, Tensor]] = lambda batch: {},
) -> TokenTable | None:
    """Make one forward-only pass over rows; see `LookaheadPass`.

    Args:
        context: The model in training.
        rows: What to look at.
        statistics: Names of vectors of `TokenStatistics`.
        loss: Gives all settings but the objective.
        keys: Gives the key of each token of a micro-batch, [B, S].
        external: The statistics that the kernel cannot compute, [B, S] each.
    """
    args = get_args()
    loss = replace(loss, objective=StatisticsOnly(statistics), log_entropy=False)

    def begin(batch: Batch) -> _ScoredBatch:
        return _ScoredBatch(keys(batch), loss.micro_batch(external=external(batch)), statistics)

    chunks = len(context.model)
    iterators = [iter(rows.micro_batches()) for _ in range(chunks)]
    with _evaluating(context):
        tables = get_forward_backward_func()(
            forward_step_func=make_forward_step(begin),
            data_iterator=iterators if chunks > 1 else iterators[0],
            model=context.model,
            num_microbatches=rows.num_micro_batches,
            seq_length=args.seq_length,
            micro_batch_size=rows.micro_batch_size,
            decoder_seq_length=args.decoder_seq_length,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return TokenTable.joined(tables) if tables else None


@contextlib.contextmanager
def _evaluating(context: TrainContext) -> Iterator[None]:
    """Without gradients, dropout, timers and the overlapped gathers of parameters, as `evaluate` does."""
    modes = [chunk.training for chunk in context.model]
    overlapped = should_disable_forward_pre_hook(get_args()) and bool(
        context.model[0].remove_forward_pre_hook_handles
    )
    if overlapped:
        disable_forward_pre_hook(context.model, optimizer=context.optimizer)
    timers, context.config.timers = context.config.timers, None
    for chunk in context.model:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk, mode in zip(context.model, modes, strict=True):
            chunk.train(mode)
        context.config.timers = timers
        if overlapped:
            enable_forward_pre_hook(context.model)
