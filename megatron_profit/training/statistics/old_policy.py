"""The old policy of PSFT: each token's log-probability at the start of an outer batch.

An outer batch is k optimizer steps. Before the first of them, one forward-only pass over the k global batches
notes log p of every supervised token under the current weights. A checkpoint inside an outer batch holds
these numbers, because the weights that gave them are gone. For example, with k = 4 a checkpoint after step 6
lies inside the outer batch of steps 4 to 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from megatron.core import mpu
from megatron.training import get_args
from megatron.training.checkpointing import get_checkpoint_name
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from checkpoint_conversion.engine.output import whole_file
from megatron_profit.flags import ArgumentsError, flag_of
from megatron_profit.megatron_patches.callbacks import TrainContext
from megatron_profit.training.checkpoints.folder import CheckpointError
from megatron_profit.training.process.console import print_rank_0
from megatron_profit.training.statistics.external_statistics import RunParts, StatisticProvider
from megatron_profit.training.statistics.lookahead_pass import LookaheadPass, data_group, values_in
from megatron_profit.training.statistics.token_table import TokenTable
from megatron_profit.training.step.batch import Batch

FILE_NAME = "old_policy.safetensors"
_VERSION = "1"


def check_old_policy(settings: Mapping[str, Any]) -> None:
    """Refuse flags with which outer batches of equal global batches cannot be formed or resumed.

    Args:
        settings: Megatron's arguments and `psft_steps_per_refresh`, by name.

    Raises:
        ArgumentsError: Names the flag, its value and what to do.
    """
    steps = settings["psft_steps_per_refresh"]
    if steps == 1:
        raise ArgumentsError(
            "--psft-steps-per-refresh 1 refreshes the old policy before every step: the ratio p / p_old "
            "is then 1 and PSFT exactly SFT; give 2 or more (8 in the paper), or use --objective sft"
        )
    if steps < 1:
        raise ArgumentsError(f"--psft-steps-per-refresh is {steps}; it must be at least 2")
    for name in ("step_batch_size_schedule", "decrease_batch_size_if_needed"):
        if settings.get(name):
            raise ArgumentsError(
                f"--{name.replace('_', '-')} changes the global batch during the run, but an outer batch of "
                "PSFT is --psft-steps-per-refresh equal ones; drop the flag"
            )


class OldPolicy(StatisticProvider):
    """Gives `old_log_prob`, and refreshes it every `steps` optimizer steps.

    Args:
        lookahead_pass: Sees the rows of the run.
        steps: Optimizer steps of an outer batch.
        first: The iteration at which the first outer batch begins, after a warm-up of plain SFT.
        data: Digest of the training data; a run with other data cannot continue an outer batch.
    """

    statistic = "old_log_prob"
    flags: ClassVar[Mapping[str, str]] = {"psft_steps_per_refresh": "--objective psft"}
    recorded = ("psft_steps_per_refresh",)
    in_evaluation = False

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """Refuse flags with which outer batches of equal global batches cannot be formed or resumed."""
        check_old_policy(settings)

    @classmethod
    def from_run(cls, run: RunParts) -> OldPolicy:
        """Return the old policy of a run."""
        steps, first = run.args.psft_steps_per_refresh, run.args.objective_warmup_steps
        return cls(run.lookahead_pass, steps, first, run.data_digest)

    def __init__(
        self, lookahead_pass: LookaheadPass, steps: int, first: int = 0, data: str = ""
    ) -> None:
        self._lookahead_pass, self._steps, self._first = lookahead_pass, steps, first
        self._data = data
        self._table: TokenTable | None = None
        # Whether the table holds the tokens of all ranks, as one read from a checkpoint does.
        self._complete = False
        # The first iteration for which the table has no values; None until there is a table.
        self._until: int | None = None

    def before_train_step(self, context: TrainContext, iteration: int) -> None:
        """Refresh the old policy at the start of an outer batch."""
        self._resume_inside_an_outer_batch()
        if iteration < (self._first if self._until is None else self._until):
            return
        if self._place(iteration):
            print_rank_0(
                f"> the old policy is refreshed at step {iteration + 1}, inside an outer batch of "
                f"{self._steps} steps: the run before was to end here, or a step was skipped"
            )
        until = min(iteration - self._place(iteration) + self._steps, get_args().train_iters)
        table = self._lookahead_pass.of_next_batches(
            context, until - iteration, frozenset({"log_prob"})
        )
        if table is not None:
            self._table = TokenTable(table.keys, {self.statistic: table.statistics["log_prob"]})
            self._complete = False
        self._until = until

    def of(self, batch: Batch, data: str) -> Tensor | None:
        """Return [B, S] of a training micro-batch; None where no loss is computed."""
        return values_in(self._table, self.statistic, batch)

    def with_checkpoint(self, folder: Path, iteration: int) -> None:
        """Put the old policy into a checkpoint inside an outer batch. A collective on the last stage."""
        if self._place(iteration) == 0:
            return
        self._resume_inside_an_outer_batch()
        if self._table is None or mpu.get_tensor_model_parallel_rank() != 0:
            return
        group = data_group()
        table = self._table if self._complete else self._table.gathered(group)
        if group.rank() == 0:
            _write(folder / FILE_NAME, table, {**self._form(), "until": str(self._until)})

    def _resume_inside_an_outer_batch(self) -> None:
        args = get_args()
        if self._until is not None or self._place(args.iteration) == 0:
            return
        folder = Path(get_checkpoint_name(args.load, args.iteration, return_base_dir=True))
        self._table, self._until, form = _read(folder / FILE_NAME, args.iteration, self._steps)
        self._complete = True
        own = self._form()
        changed = [
            "other data"
            if name == "data"
            else f"{flag_of(name)} {own[name]} (was {form.get(name)})"
            for name in own
            if form.get(name) != own[name]
        ]
        if changed:
            raise CheckpointError(
                f"{folder} was saved inside an outer batch of PSFT, which cannot go on with "
                f"{', '.join(changed)}; resume with the same flags and data"
            )
        if not mpu.is_pipeline_last_stage(ignore_virtual=True):
            self._table = None

    def _place(self, iteration: int) -> int:
        """Return the steps of the outer batch that are done before an iteration."""
        return max(iteration - self._first, 0) % self._steps

    def _form(self) -> dict[str, str]:
        """Return the settings that two runs must share to continue an outer batch."""
        args = get_args()
        return {
            "version": _VERSION,
            "psft_steps_per_refresh": str(self._steps),
            "objective_warmup_steps": str(self._first),
            "global_batch_size": str(args.global_batch_size),
            "data": self._data,
        }


def _write(file: Path, table: TokenTable, form: dict[str, str]) -> None:
    """Write the file atomically: under another name first, then renamed."""
    tensors = {"keys": table.keys.cpu(), **{n: v.cpu() for n, v in table.statistics.items()}}
    with whole_file(file) as stream:
        stream.write(save(tensors, metadata=form))


def _read(file: Path, iteration: int, steps: int) -> tuple[TokenTable, int, dict[str, str]]:
    """Return the table, the first iteration without values in it, and the settings of the run
    that wrote it.
    """
    if not file.is_file():
        raise CheckpointError(
            f"iteration {iteration} is inside an outer batch of {steps} steps, but {file} is missing: this "
            f"checkpoint is not one of PSFT with --psft-steps-per-refresh {steps}. Resume with the flags "
            "that it was trained with, or begin a new run from it with --pretrained-checkpoint"
        )
    try:
        with safe_open(file, framework="pt") as stored:
            keys, values = (stored.get_tensor(name) for name in ("keys", OldPolicy.statistic))
            form = stored.metadata() or {}
            until = int(form["until"])
        _check_table(keys, values)
        # It ends before `iteration` where a step that was to refresh it was skipped.
        if not 0 < until <= iteration + steps:
            raise ValueError(f"it is for steps up to {until}, which is not in this outer batch")
    except KeyError as error:
        raise _damaged(file, f"it does not say {error}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, error) from error
    return TokenTable(keys.cuda(), {OldPolicy.statistic: values.cuda()}), until, form


def _check_table(keys: Tensor, values: Tensor) -> None:
    """Refuse keys [T] and values [T] that cannot come from a table.

    Raises:
        ValueError: Names the fault.
    """
    if keys.dtype != torch.int64 or values.dtype != torch.float32 or keys.dim() != 1:
        raise ValueError(
            f"its keys are {keys.dtype} {list(keys.shape)}, its values {values.dtype}; expected a row of "
            "int64 and a row of float32"
        )
    if keys.shape != values.shape:
        raise ValueError(f"it has {len(keys)} keys, and values of shape {list(values.shape)}")
    if (keys.diff() < 0).any():
        raise ValueError("its keys are not in ascending order")


def _damaged(file: Path, why: object) -> CheckpointError:
    return CheckpointError(
        f"{file} is damaged: {why}. Resume from an earlier checkpoint (--ckpt-step), or begin a new "
        "run from this one with --pretrained-checkpoint"
    )
