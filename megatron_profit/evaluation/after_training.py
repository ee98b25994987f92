"""The evaluation of what a training run exports: its flags, and its process after or next to the training."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.flags import ArgumentsError, flag, flag_of, options_of

# Set by torchrun; an engine would take the process for a rank of several, and with an older torch wait for
# the store of torchrun in place of its own.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_TORCHRUN = "TORCHELASTIC_"

# Name of the export in the results.
_LABEL = "trained"


@dataclass(frozen=True)
class EvalTasks:
    """The evaluation after the last step, and on request during the training."""

    eval_tasks: str | None = flag(
        "Evaluate the --export-hf folder on these tasks after training, for example gsm8k,ifeval. With "
        "--export-best that is the best checkpoint.",
        metavar="NAMES",
    )
    eval_flags: str = flag(
        "Flags of megatron-profit evaluate for it, for example '--data data/eval --samples 8'.",
        default="",
        metavar="FLAGS",
    )
    eval_tasks_interval: int | None = flag(
        "Evaluate the tasks every N steps as well, with transformers on the first machine's CPUs while the "
        "training waits. --keep-best then knows them.",
        type=int,
        metavar="N",
    )
    eval_tasks_limit: int = flag(
        "Questions of each task in the evaluations of --eval-tasks-interval.",
        type=int,
        default=50,
        metavar="N",
    )

    @property
    def is_wanted(self) -> bool:
        """Whether there is a task, by its name or as a --task-file."""
        files = [word for word in shlex.split(self.eval_flags) if word.startswith("--task-file")]
        return self.eval_tasks is not None or bool(files)

    @property
    def names(self) -> list[str]:
        """The names of the package's tasks."""
        return [name.strip() for name in (self.eval_tasks or "").split(",") if name.strip()]

    @property
    def tasks(self) -> list[str]:
        """The names of all tasks, also of the ones that a --task-file brings."""
        from megatron_profit.evaluation.questions import name_of_file

        return [*self.names, *map(name_of_file, _settings_of(self).task_file)]

    @property
    def metrics(self) -> list[str]:
        """The tasks whose scores an evaluation during the training has."""
        return self.tasks if self.eval_tasks_interval is not None else []

    def command(self, export: Path, out: Path, *further: str) -> list[str]:
        """Return the command that evaluates an export.

        Args:
            export: The folder of the model.
            out: The folder of the results.
            *further: Flags after the user's, which they replace.
        """
        return [
            *(sys.executable, "-m", "megatron_profit", "evaluate", f"{_LABEL}={export.absolute()}"),
            *(("--tasks", self.eval_tasks) if self.eval_tasks else ()),
            *shlex.split(self.eval_flags),
            *("--out", str(out.absolute()), *further),
        ]

    def command_during(self, export: Path, out: Path) -> list[str]:
        """Return the command of an evaluation during the training, which holds the GPU's memory."""
        limit = str(self.eval_tasks_limit)
        return self.command(export, out, "--engine", "transformers", "--limit", limit)


def results_of(export: Path) -> Path:
    """Return the folder of an export's results, next to it."""
    return export.absolute().with_name(f"{export.name}-evaluation")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise EvaluationError(message)


def eval_tasks(values: Mapping[str, Any]) -> EvalTasks:
    """Return the flags of the evaluation after training, checked without touching a file.

    Args:
        values: All arguments, by name.

    Raises:
        ArgumentsError: Names the flag, its value and the remedy.
    """
    from megatron_profit.evaluation.questions import check_names

    options = options_of(EvalTasks, values)
    with _naming(options):
        given = _settings_of(options)
        if given.template_date is not None and values["template_date"] is None:
            raise EvaluationError(
                f"--template-date {given.template_date}: the training has none, as its chat template writes "
                "no date; drop it"
            )
        if not options.is_wanted:
            for name in ("eval_flags", "eval_tasks_interval"):
                if values[name]:
                    raise ArgumentsError(f"{flag_of(name)} is about --eval-tasks, which is missing")
            return options
        check_names(options.names)
        if given.server is not None:
            raise EvaluationError(
                f"--server {given.server} does not have the weights of this run; drop it"
            )
    if not values["export_hf"]:
        raise ArgumentsError("--eval-tasks evaluates the folder of --export-hf, which is missing")
    if options.eval_tasks_interval is not None:
        _check_interval(options, values)
    day = values["template_date"]
    if day is None:
        return options
    # A day in the user's own flags comes later and counts.
    return replace(options, eval_flags=f"--template-date {shlex.quote(day)} {options.eval_flags}")


def _check_interval(options: EvalTasks, values: Mapping[str, Any]) -> None:
    every, evaluates = options.eval_tasks_interval, values["eval_interval"]
    assert every is not None
    if every < 1 or options.eval_tasks_limit < 1:
        raise ArgumentsError("--eval-tasks-interval and --eval-tasks-limit must be at least 1")
    if not (values["valid_data"] or values["valid_split"]) or values["eval_iters"] == 0:
        raise ArgumentsError(
            f"--eval-tasks-interval {every} adds tasks to the evaluations of a run, and there are none; give "
            "--valid-data or --valid-split"
        )
    if every % evaluates:
        raise ArgumentsError(
            f"--eval-tasks-interval {every} must be a multiple of --eval-interval {evaluates}"
        )


def check_task_files(options: EvalTasks) -> None:
    """Check before the training that the tasks can be evaluated after it: packages, files and columns.

    Raises:
        ArgumentsError: A package or a task's file is missing, or a file cannot be used.
    """
    from megatron_profit.evaluation.command_line import load_tasks

    if not options.is_wanted:
        return
    with _naming(options):
        load_tasks(_settings_of(options))


def _settings_of(options: EvalTasks) -> argparse.Namespace:
    from megatron_profit.evaluation.command_line import add_evaluation_flags, sampling_of

    parser = _Parser(add_help=False, allow_abbrev=False)
    add_evaluation_flags(parser)
    given = parser.parse_args(shlex.split(options.eval_flags))
    if given.tasks:
        raise EvaluationError(
            f"--tasks {given.tasks}: name tasks with --eval-tasks, which is checked"
        )
    if options.eval_tasks is not None:
        given.tasks = options.eval_tasks
    for name in options.names:
        sampling_of(given, name)
    return given


@contextlib.contextmanager
def _naming(options: EvalTasks) -> Iterator[None]:
    """Name the flags in the errors of the block."""
    try:
        yield
    except ArgumentsError:
        raise
    except ValueError as error:
        tasks = f"--eval-tasks {options.eval_tasks}" if options.eval_tasks is not None else ""
        flags = f"--eval-flags {options.eval_flags!r}" if options.eval_flags else ""
        raise ArgumentsError(f"{' '.join(filter(None, (tasks, flags)))}: {error}") from error


def environment_of_engine(*, on_cpu: bool = False) -> dict[str, str]:
    """Return the environment of a process that is no rank of the run and may use all cores.

    Args:
        on_cpu: Whether GPUs are hidden from it.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER and not name.startswith(_OF_TORCHRUN)
    }
    if (
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
        and environment.get("OMP_NUM_THREADS") == "1"
    ):
        del environment["OMP_NUM_THREADS"]  # torchrun sets it where several ranks share a machine
    return environment | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})


def remove_answers_of_other_weights(options: EvalTasks, export: Path) -> list[Path]:
    """Remove the answers to these tasks that another state of the weights than the export's has given.

    Answers of the same weights stay, also where only some of the tasks have them. Answers to other tasks, and
    files that are damaged or that another process writes, stay too: the evaluation names the latter.

    Returns:
        The removed files.
    """
    from checkpoint_conversion.engine.lock import lock_file
    from megatron_profit.evaluation.engines.model_folder import fingerprint
    from megatron_profit.evaluation.records import read_records_file
    from megatron_profit.evaluation.run import records_file

    files = [records_file(results_of(export), _LABEL, task) for task in options.tasks]
    known = [file for file in files if file.exists()]
    identity = fingerprint(str(export)) if known else ""
    removed = []
    for file in known:
        with (
            contextlib.suppress(EvaluationError, BlockingIOError),
            lock_file(file.with_suffix(".lock"), patience=0),
        ):
            if read_records_file(file)[0].get("identity") != identity:
                file.unlink()
                removed.append(file)
    return removed


def become_evaluation(options: EvalTasks, export: Path) -> NoReturn:
    """Replace this process by the evaluation of the export, which frees all of its memory.

    Answers of the same weights are kept. Answers of an earlier state of the run, which has gone on since, are
    asked again. The exit code of the process is the evaluation's.
    """
    results = results_of(export)
    if removed := remove_answers_of_other_weights(options, export):
        names = ", ".join(file.stem for file in removed)
        print(f"> {results} held answers of other weights, which are asked again: {names}")
    command = options.command(export, results)
    # The libraries write what they still hold when a process ends, and this one has no end.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, environment_of_engine())
