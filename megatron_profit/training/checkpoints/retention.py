"""The checkpoints that a run keeps, and the stop of a run whose evaluations no longer improve.

All facts for it are in the checkpoints themselves. Each has a marker with the state of the early stop, and
the means of the evaluation at its iteration. So a resumed run decides like an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from megatron.training import get_args

from checkpoint_conversion.errors import ConversionError, warn
from checkpoint_conversion.hf.carried import Notes, write_notes
from checkpoint_conversion.model_card.facts import RUN, STEP, TOTALS, Facts
from megatron_profit.megatron_patches.callbacks import Callback
from megatron_profit.megatron_patches.enduring import reason
from megatron_profit.training.checkpoints.folder import (
    MARKER,
    VALIDATION,
    CheckpointError,
    Saved,
    best,
    better,
    drop_replaced,
    folder_of,
    make_room,
    prune,
    read_json,
    restore_backup,
    same_folder,
    saved_in,
    write_json,
)
from megatron_profit.training.checkpoints.keep_options import KeepOptions
from megatron_profit.training.checkpoints.run_record import RunRecord
from megatron_profit.training.checkpoints.save_folder import JOB, clear_save_folder, names_of
from megatron_profit.training.checkpoints.save_lock import hold_still
from megatron_profit.training.checkpoints.size import check_space
from megatron_profit.training.monitoring.run_totals import RunTotals
from megatron_profit.training.process.console import fail, print_rank_0, warn_rank_0
from megatron_profit.training.process.launcher import job_id
from megatron_profit.training.process.ranks import from_first_rank, is_first_rank

_FORMAT = 1
# The key of a marker with the iterations whose checkpoints led to it, its own included.
_COURSE = "course"


@dataclass(frozen=True)
class EarlyStopState:
    """The evaluations so far, as far as an early stop needs them.

    Attributes:
        metric: The metric that is watched.
        best: Its best value; None before the first evaluation.
        best_iteration: The iteration of the best value.
        iteration: The last evaluation.
        without_best: Evaluations since the best one.
    """

    metric: str
    best: float | None = None
    best_iteration: int = 0
    iteration: int = 0
    without_best: int = 0

    def checked(self) -> EarlyStopState:
        """Return this object if all values are of the types above.

        Raises:
            TypeError: A value is of another type.
        """
        numbers = (self.best_iteration, self.iteration, self.without_best)
        if not isinstance(self.metric, str) or not all(type(number) is int for number in numbers):
            raise TypeError("the state of an early stop counts evaluations of a metric")
        if self.best is not None and not isinstance(self.best, float):
            raise TypeError("the best value of a metric must be a number")
        return self

    def after(self, iteration: int, value: float) -> EarlyStopState:
        """Return the progress after one more evaluation.

        An evaluation that is made again, as at the end of a run, does not count.
        """
        if iteration <= self.iteration:
            return self
        sign = better(self.metric)
        is_best = math.isfinite(value) and (self.best is None or sign * value > sign * self.best)
        if is_best:
            return EarlyStopState(self.metric, value, iteration, iteration, 0)
        return replace(self, iteration=iteration, without_best=self.without_best + 1)


class Retention(Callback):
    """Marks the checkpoints of a run, removes those that are not kept, and ends the run early.

    Args:
        options: The options of the flags.
        record: The record of the run, which each checkpoint holds. Only the first rank needs it.
        totals: The totals of the run, which each checkpoint holds too.
        carried: The notes of each checkpoint on tensors that are not trained; as `record`.
    """

    def __init__(
        self,
        options: KeepOptions,
        record: RunRecord,
        totals: RunTotals,
        carried: Notes = MappingProxyType({}),
    ) -> None:
        self._options, self._record, self._totals = options, record, totals
        self._carried = carried
        self._progress = None if options.keep_best is None else EarlyStopState(options.keep_best)
        self._evaluated: tuple[int, Mapping[str, float]] = (-1, {})
        self._resumed_from: frozenset[int] = frozenset()
        # Iterations whose checkpoints in --save this run has made or goes on from.
        self._counted: set[int] = set()

    def before_training(self, iteration: int) -> None:
        """Continue from the state in the loaded checkpoint.

        A run that had stopped ends without a step. A run that replaces another one removes it here.
        """
        args, self._totals.step = get_args(), iteration
        if args.overwrite and args.save:
            self._replace_run(Path(args.save))
        if iteration == 0 or args.load is None:
            return
        load = Path(args.load)
        if same_folder(load, args.save):
            self._resumed_from = frozenset({iteration})
            self._counted = from_first_rank(lambda: _saved_course(load, iteration))
            self._tell_of_others(load)
        file = folder_of(load, iteration) / MARKER
        self._totals.restore(from_first_rank(lambda: _saved_totals(file)), iteration)
        if self._progress is None:
            return
        saved = from_first_rank(lambda: _saved_progress(file))
        if saved is not None and saved.metric == self._progress.metric:
            self._progress = saved
            self._stop_if_patience_has_ended(iteration)

    def _tell_of_others(self, save: Path) -> None:
        """Tell of checkpoints that do not count, because the run has gone back before them."""
        if not is_first_rank() or self._options == KeepOptions():
            return
        others = [
            saved.iteration
            for saved in reversed(saved_in(save))
            if saved.is_own and saved.is_complete and saved.iteration not in self._counted
        ]
        if others:
            print_rank_0(
                f"> checkpoints in {save} that this run does not go on from: "
                f"{', '.join(map(str, others))}; until it writes them again, they stay and do not count for "
                "--keep-last and --keep-best"
            )

    def _replace_run(self, save: Path) -> None:
        """Only now that the weights are loaded: until here, a failure leaves the old run as it was."""
        if is_first_rank():
            try:
                removed = clear_save_folder(save)
            except OSError as error:
                fail(f"--overwrite: the run in {save} cannot be removed: {error}")
            if removed:
                print_rank_0(f"> removed the run in {save} (--overwrite): {names_of(removed)}")
        torch.distributed.barrier()

    def after_evaluation(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Write the means next to the checkpoint, if it exists already, and stop the run in time."""
        self._evaluated = (iteration, metrics)
        save = get_args().save
        if save and is_first_rank():
            here = Saved(iteration, folder_of(Path(save), iteration))
            is_counted = iteration in self._counted and here.is_own
            if is_counted and not (here.folder / VALIDATION).exists():
                _note(here.folder / VALIDATION, metrics)
        if self._progress is None:
            return
        value = metrics.get(self._progress.metric)
        if value is None:  # tasks are not part of each evaluation
            return
        self._progress = self._progress.after(iteration, value)
        self._stop_if_patience_has_ended(iteration)

    def before_checkpoint(self, folder: Path, iteration: int, size: int) -> None:
        problem = from_first_rank(lambda: _prepare(folder, size))
        if problem is not None:
            raise CheckpointError(f"no checkpoint of step {iteration} was written: {problem}")
        self._totals.share()

    def with_checkpoint(self, folder: Path, iteration: int) -> None:
        if not is_first_rank():
            return
        there = {saved.iteration for saved in saved_in(folder.parent)}
        self._counted = self._counted & there | {iteration}
        progress = None if self._progress is None else asdict(self._progress)
        content = {
            "format": _FORMAT,
            STEP: iteration,
            "progress": progress,
            _COURSE: sorted(self._counted),
            JOB: job_id(),
            TOTALS: self._totals.to_json(),
            RUN: self._record.to_json(),
        }
        write_json(folder / MARKER, content)
        write_notes(folder, self._carried)
        at, metrics = self._evaluated
        if at == iteration:
            write_json(folder / VALIDATION, metrics)

    def after_checkpoint(self, iteration: int) -> None:
        if not is_first_rank():
            return
        save, options = Path(get_args().save), self._options
        try:
            drop_replaced(folder_of(save, iteration))
            if options.keep_last is not None:
                removed = prune(
                    *(save, iteration, options.keep_last, options.keep_best),
                    *(self._resumed_from, self._counted),
                )
                for folder in removed:
                    print_rank_0(f"> removed {folder} (--keep-last {options.keep_last})")
        except (CheckpointError, ConversionError, OSError) as error:
            # The run is worth more than the space that a removal would free.
            warn_rank_0(f"no checkpoint that is not kept could be removed: {error}")

    def facts(self) -> Facts:
        """Return the facts of the training for a model card of the weights as they are now. A collective.

        Only the first rank has the record.
        """
        self._totals.share()
        step, (at, metrics) = self._totals.step, self._evaluated
        evaluation = metrics if at == step else {}
        return Facts(step, self._record.to_json(), self._totals.to_json(), evaluation)

    def best(self) -> Saved:
        """Return the best checkpoint in --save, the same on all ranks.

        Raises:
            ConversionError: There is none.
        """
        assert self._progress is not None
        save, metric = get_args().save, self._progress.metric
        found = from_first_rank(lambda: best(Path(save), metric, self._counted))
        if found is None:
            raise ConversionError(
                f"no checkpoint in {save} has an evaluation with a finite {metric}"
            )
        return found

    def _stop_if_patience_has_ended(self, iteration: int) -> None:
        args, progress, patience = get_args(), self._progress, self._options.early_stop
        if patience is None or progress is None or progress.without_best < patience:
            return
        if iteration < args.train_iters:
            print_rank_0(
                f"> stopped after iteration {iteration} of {args.train_iters}: no better {progress.metric} "
                f"in {progress.without_best} evaluations (--early-stop {patience}); the best was "
                f"{progress.best} after iteration {progress.best_iteration}; to train on, give a larger "
                "--early-stop"
            )
            # Megatron's loop ends here as after its last step.
            args.train_iters = iteration


def _prepare(folder: Path, size: int) -> str | None:
    """Prepare the place of a checkpoint; return why it cannot be written there, or None."""
    save = folder.parent
    try:
        hold_still(save)
        make_room(folder)
        check_space(save, size)
    except (CheckpointError, OSError) as error:
        with contextlib.suppress(OSError):
            restore_backup(save)
            folder.rmdir()  # Megatron has made it, and it is empty
        is_ours = isinstance(error, CheckpointError)
        return str(error) if is_ours else f"{save} cannot be written ({reason(error)})"
    return None


def _note(file: Path, metrics: Mapping[str, float]) -> None:
    try:
        write_json(file, metrics)
    except OSError as error:
        warn(
            f"{file} cannot be written ({reason(error)}); this checkpoint will not count as the best"
        )


def _saved_totals(file: Path) -> Mapping[str, Any]:
    """Return the totals in the marker of a checkpoint; empty where it has none."""
    saved = read_json(file).get(TOTALS)
    return saved if isinstance(saved, Mapping) else {}


def _saved_course(load: Path, iteration: int) -> set[int]:
    """Return the iterations of the checkpoints that led to one, its own included.

    A checkpoint of an earlier version does not say: all that are not newer count.
    """
    file = folder_of(load, iteration) / MARKER
    course = read_json(file).get(_COURSE)
    if course is None:
        return {saved.iteration for saved in saved_in(load) if saved.iteration <= iteration}
    if not isinstance(course, list) or any(type(number) is not int for number in course):
        raise CheckpointError(f"{file} is damaged: its {_COURSE} is {course!r}")
    return {*course, iteration}


def _saved_progress(file: Path) -> EarlyStopState | None:
    """Return the state of the early stop in the marker of a checkpoint, if there is one."""
    saved = read_json(file).get("progress")
    if saved is None:
        return None
    try:
        return EarlyStopState(**saved).checked()
    except TypeError as error:
        raise CheckpointError(f"{file} is damaged: its progress is {saved!r}") from error
