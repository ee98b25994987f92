"""The evaluation of what a training run exports, by the first rank when the training is over."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_profit.evaluation.errors import EvaluationError, require
from megatron_profit.flags import ArgumentsError, flag, options_of

# Set by torchrun; an engine would take the process for a rank of several.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class EvalTasks:
    """The evaluation after the last step."""

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

    @property
    def names(self) -> list[str]:
        """The names of the tasks."""
        return [name.strip() for name in (self.eval_tasks or "").split(",") if name.strip()]

    def command(self, export: Path) -> list[str]:
        """Return the command that evaluates the export; its results go next to it."""
        return [
            *(sys.executable, "-m", "megatron_profit", "evaluate", f"trained={export.absolute()}"),
            *("--tasks", str(self.eval_tasks), *shlex.split(self.eval_flags)),
            *("--out", str(export.absolute().with_name(f"{export.name}-evaluation"))),
        ]


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
    if options.eval_tasks is None:
        if options.eval_flags:
            raise ArgumentsError("--eval-flags is about --eval-tasks, which is missing")
        return options
    if not values["export_hf"]:
        raise ArgumentsError("--eval-tasks evaluates the folder of --export-hf, which is missing")
    with _naming(options):
        check_names(options.names)
        _settings_of(options)
    return options


def check_task_files(options: EvalTasks) -> None:
    """Check before the training that the tasks can be evaluated after it: packages and files.

    Raises:
        ArgumentsError: A package or a task's file is missing.
    """
    from megatron_profit.evaluation.questions import find_file

    if options.eval_tasks is None:
        return
    with _naming(options):
        require("lm_eval", "math_verify", for_what="it")
        for name in options.names:
            find_file(name, _settings_of(options).data)


def _settings_of(options: EvalTasks) -> argparse.Namespace:
    from megatron_profit.evaluation.command_line import SamplingOfTasks, add_evaluation_flags

    parser = _Parser(add_help=False, allow_abbrev=False)
    add_evaluation_flags(parser)
    given = parser.parse_args(shlex.split(options.eval_flags))
    for name in options.names:
        SamplingOfTasks(given).of(name)
    return given


@contextlib.contextmanager
def _naming(options: EvalTasks) -> Iterator[None]:
    """Name the flags in the errors of the block."""
    try:
        yield
    except ValueError as error:
        flags = f" --eval-flags {options.eval_flags!r}" if options.eval_flags else ""
        raise ArgumentsError(f"--eval-tasks {options.eval_tasks}{flags}: {error}") from error


def become_evaluation(options: EvalTasks, export: Path) -> NoReturn:
    """Replace this process by the evaluation of the export, which frees all of its memory.

    The exit code of the process is the evaluation's.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    # The libraries write what they still hold when a process ends, and this one has no end.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, options.command(export), environment)
