"""The evaluation of tasks during a training, in a process of its own on the first machine's CPUs.

Every `--eval-tasks-interval` steps all ranks export the weights to a temporary folder, and the first rank
starts `megatron-profit evaluate` on it, while the training waits. The scores join the metrics of the run's
evaluation at that step, so that logs, `--keep-best` and `--early-stop` know them.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron.training import get_tensorboard_writer, get_wandb_writer

from checkpoint_conversion.engine.output import remove_folder
from checkpoint_conversion.errors import ConversionError
from megatron_profit.evaluation.after_training import EvalTasks, environment_of_engine
from megatron_profit.megatron_patches.callbacks import Callback, RunFailure
from megatron_profit.parent_death import die_with_parent
from megatron_profit.training.process.console import print_rank_0, warn_rank_0
from megatron_profit.training.process.exit_signals import signal_has_come
from megatron_profit.training.process.ranks import from_first_rank, is_first_rank

LOG = "evaluate.log"
# The other ranks wait in a collective, which must not take longer than its time limit. And a run that gets a
# signal has only some seconds to save.
_LOOK_EVERY_SECONDS = 2
_SIGNAL = "a signal ends the run"


@dataclass
class TaskEvaluation(Callback):
    """Exports, evaluates, and returns the scores.

    Attributes:
        options: The flags.
        export_to: Writes the weights to a folder; all ranks call it together.
        folder: Gets a folder `step_0000100` with the results of each evaluation.
    """

    options: EvalTasks
    export_to: Callable[[Path], None]
    folder: Path
    _at: int = -1
    _scores: Mapping[str, float] = field(default_factory=dict)

    def evaluation_metrics(self, iteration: int) -> Mapping[str, float]:
        """Return the score of each task, avg@k, after every `eval_tasks_interval` steps."""
        interval = self.options.eval_tasks_interval
        assert interval is not None
        if iteration % interval:
            return {}
        if iteration != self._at:  # the last step is evaluated twice
            self._at, self._scores = iteration, self._evaluate(iteration)
        return self._scores

    def _evaluate(self, iteration: int) -> Mapping[str, float]:
        """Return the scores; none if the evaluation fails, or if a signal ends the run before its end."""
        scores, problem = ({}, _SIGNAL) if signal_has_come() else self._asked(iteration)
        if problem:
            warn_rank_0(f"the tasks were not evaluated after step {iteration}: {problem}")
        _log(iteration, scores)
        return scores

    def _asked(self, iteration: int) -> tuple[dict[str, float], str | None]:
        """Return the score of each task, and why there are none, or None."""
        out = self.folder / f"step_{iteration:07}"
        model = out / "model"
        try:
            if is_first_rank():  # an earlier process may have ended while it removed this folder
                remove_folder(model)
            self.export_to(model)
        except (ConversionError, OSError) as error:
            # Not all ranks have met it, so the others wait for this one.
            raise RunFailure(
                f"the tasks cannot be evaluated after step {iteration}: {error}"
            ) from error
        process = self._start(model, out) if is_first_rank() else None
        print_rank_0(
            f"> evaluating {', '.join(self.options.metrics)}; its progress is in {out / LOG}"
        )
        has_ended = _has_ended(process)
        if is_first_rank():
            with contextlib.suppress(OSError):
                remove_folder(model)
        return from_first_rank(lambda: _scores_in(out, process)) if has_ended else ({}, _SIGNAL)

    def _start(self, model: Path, out: Path) -> subprocess.Popen[bytes]:
        with (out / LOG).open("wb") as log:
            return subprocess.Popen(
                [*self.options.command_during(model, out), "--overwrite"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment_of_engine(on_cpu=True),
                preexec_fn=die_with_parent,
            )


def _has_ended(process: subprocess.Popen[bytes] | None) -> bool:
    """Wait for the process of the first rank, and return whether it came to its end.

    A signal at any rank ends it before that: the run has to save before it is killed.
    """
    while from_first_rank(lambda: _goes_on(process)):
        if signal_has_come():
            from_first_rank(lambda: _end(process))
            return False
    return True


def _end(process: subprocess.Popen[bytes] | None) -> None:
    assert process is not None
    process.terminate()
    try:
        process.wait(_LOOK_EVERY_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _goes_on(process: subprocess.Popen[bytes] | None) -> bool:
    """Wait a while for the end of the process, and return whether it still runs."""
    assert process is not None
    try:
        process.wait(_LOOK_EVERY_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _scores_in(
    out: Path, process: subprocess.Popen[bytes] | None
) -> tuple[dict[str, float], str | None]:
    """Return the score of each task in the results, and why there are none, or None."""
    assert process is not None
    if process.returncode:
        lines = (out / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {}, f"{lines[-1] if lines else 'it ended'} ({out / LOG})"
    results = json.loads((out / "results.json").read_text())["results"]
    return {result["task"]: result["average"]["value"] for result in results}, None


def _log(iteration: int, scores: Mapping[str, float]) -> None:
    """Add the scores to TensorBoard and W&B, next to the validation metrics."""
    board, wandb = get_tensorboard_writer(), get_wandb_writer()
    for name, score in scores.items():
        if board:
            board.add_scalar(f"{name} validation", score, iteration)
        if wandb:
            wandb.log({f"{name} validation": score}, iteration)
