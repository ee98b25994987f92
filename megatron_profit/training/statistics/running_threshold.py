"""A threshold that is a quantile of the tokens of recent steps, without a pass of its own.

The probabilities of each step's tokens are counted in bins, and the counts of earlier steps fade: each step's
count for 0.9 times as much in the next. The quantile of these counts is the threshold of the step that
follows. The counts are sums over all ranks, so the threshold is the same at any layout. A checkpoint holds
them, so that a resumed run goes on as if it had not been interrupted.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.training import get_args
from megatron.training.checkpointing import get_checkpoint_name
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import logsigmoid

from checkpoint_conversion.engine.output import whole_file
from megatron_profit.megatron_patches.callbacks import TrainContext
from megatron_profit.objectives import TokenStatistics
from megatron_profit.objectives.quantiles import MAX_LOG_PROB, MIN_LOG_PROB
from megatron_profit.objectives.thresholds import ThresholdObjective
from megatron_profit.training.checkpoints.folder import CheckpointError
from megatron_profit.training.process.console import print_rank_0
from megatron_profit.training.statistics.external_statistics import RunParts, StatisticProvider
from megatron_profit.training.statistics.lookahead_pass import LookaheadPass, data_group
from megatron_profit.training.statistics.token_table import TokenTable
from megatron_profit.training.step.batch import Batch
from megatron_profit.training.step.objective_loss import ObjectiveLoss
from megatron_profit.training.step.token_metrics import (
    ProbQuantiles,
    counts_in_bins,
    quantile_in_bins,
)

# Weight of a step's tokens in the next step, compared with that step's own.
FADING = 0.9


class RunningThreshold(StatisticProvider):
    """Gives a bound on log p, the same for all tokens of a step.

    Before the first step there are no counts, and one pass over its tokens makes them.

    Args:
        loss: The loss of the run.
        lookahead_pass: Sees the rows of the run.
    """

    def __init__(self, loss: ObjectiveLoss, lookahead_pass: LookaheadPass) -> None:
        self._loss, self._pass = loss, lookahead_pass
        # [BINS] float64, alike on all ranks of the last stage; and [BINS] int64 of this rank, of a step that
        # is not yet among them.
        self._counts: Tensor | None = None
        self._new: Tensor | None = None
        # Whether there are counts of training; alike on every rank.
        self._started = False
        self._has_looked = False

    @classmethod
    def from_run(cls, run: RunParts) -> RunningThreshold:
        """Return the threshold of a run."""
        return cls(run.loss, run.lookahead_pass)

    @property
    def _objective(self) -> ThresholdObjective | None:
        """The objective of the step, if it reads this statistic; none does in a warm-up of plain SFT."""
        objective = self._loss.current_objective
        reads = self.statistic in objective.required_statistics
        return objective if reads and isinstance(objective, ThresholdObjective) else None

    def before_train_step(self, context: TrainContext, iteration: int) -> None:
        """Bring the counts up to date."""
        self._resume()
        self._add_step()
        if self._objective is not None and not self._started:
            reads = self._objective.signal_reads | {"log_prob"}
            self._begin_with(self._pass.of_next_batches(context, 1, reads))
            self._started = True

    def before_evaluation(self, context: TrainContext) -> None:
        """Bring the counts up to date; before any training, count a batch of the evaluation."""
        self._resume()
        self._add_step()
        if self._objective is not None and not self._started:
            reads = self._objective.signal_reads | {"log_prob"}
            self._begin_with(self._pass.of_valid_batch(context, 0, reads))

    def observe(self, tokens: TokenStatistics) -> None:
        """Count the tokens of a training micro-batch."""
        if self._objective is not None:
            counts = counts_in_bins(self._objective.seen(tokens).log_prob)
            self._new = counts if self._new is None else self._new + counts

    def of(self, batch: Batch, data: str) -> Tensor | None:
        """Return [B, S], in each place the bound; None where no loss is computed."""
        if self._counts is None or self._objective is None:
            return None
        quantile = self._objective.quantile_of[self.statistic]
        return self._bound(quantile).float().expand(batch.labels.shape)

    @property
    def _signal(self) -> str:
        """The model whose probabilities are counted."""
        final = self._loss.objective.final
        assert isinstance(final, ThresholdObjective)
        return final.objective_signal

    def _bound(self, quantile: float) -> Tensor:
        """Return the bound as a scalar; at the quantile 0 or 1 that keeps all it is exact."""
        assert self._counts is not None
        if self.statistic == MIN_LOG_PROB and quantile == 0:
            return self._counts.new_full((), -math.inf)
        if self.statistic == MAX_LOG_PROB and quantile == 1:
            return self._counts.new_zeros(())
        return logsigmoid(quantile_in_bins(self._counts, quantile))

    def _begin_with(self, table: TokenTable | None) -> None:
        if table is None or self._objective is None:
            return
        signal = self._objective.seen(TokenStatistics(**table.statistics)).log_prob
        counts = counts_in_bins(signal)
        dist.all_reduce(counts, group=data_group())
        self._counts = counts.double()

    def _add_step(self) -> None:
        """Add the tokens of the step that is done. A collective where there are any."""
        if self._new is not None and self._counts is not None:
            dist.all_reduce(self._new, group=data_group())
            self._counts = FADING * self._counts + self._new
        self._new = None

    @property
    def _file(self) -> str:
        """Name of the file in a checkpoint."""
        return f"running_{self.statistic}.safetensors"

    def with_checkpoint(self, folder: Path, iteration: int) -> None:
        """Put the counts into a checkpoint. A collective on the last stage."""
        self._resume()
        self._add_step()
        if not self._started or self._counts is None or mpu.get_tensor_model_parallel_rank() != 0:
            return
        if data_group().rank() == 0:
            with whole_file(folder / self._file) as stream:
                counts = {"counts": self._counts.cpu()}
                stream.write(save(counts, metadata={"signal": self._signal}))

    def _resume(self) -> None:
        """Take the counts from the checkpoint that the run resumes from."""
        args = get_args()
        if self._has_looked or not args.iteration:
            return
        self._has_looked = True
        folder = Path(get_checkpoint_name(args.load, args.iteration, return_base_dir=True))
        counts = None
        if (folder / self._file).is_file():
            counts = _read(folder / self._file, self._signal)
        if counts is None:
            print_rank_0(
                f"> {folder} holds no {self._file} of the {self._signal} model: the running threshold begins "
                "with the tokens of the next step"
            )
            return
        self._started = True
        if mpu.is_pipeline_last_stage(ignore_virtual=True):
            self._counts = counts.cuda()


class RunningMinimum(RunningThreshold):
    """Gives `min_log_prob`."""

    statistic = MIN_LOG_PROB


class RunningMaximum(RunningThreshold):
    """Gives `max_log_prob`."""

    statistic = MAX_LOG_PROB


def _read(file: Path, signal: str) -> Tensor | None:
    """Return the counts [BINS] of a file, or None if they count the probabilities of another model.

    Raises:
        CheckpointError: The file cannot come from a run.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            counts = stored.get_tensor("counts")
            of_signal = (stored.metadata() or {}).get("signal")
        if counts.dtype != torch.float64 or counts.shape != (ProbQuantiles.BINS,):
            raise ValueError(f"its counts are {counts.dtype} {list(counts.shape)}")
        if not (counts.isfinite().all() and (counts >= 0).all()):
            raise ValueError("a count is negative or not finite")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is damaged: {error}. Resume from an earlier checkpoint (--ckpt-step), or remove the "
            "file: then the running threshold begins anew"
        ) from error
    return counts if of_signal == signal else None
