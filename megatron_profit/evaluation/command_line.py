"""The flags of an evaluation, and the tasks, settings and models that they name."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint_conversion.engine.output import problem_of_place
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.sampling import PRESETS, Sampling, choose_sampling
from megatron_profit.flags import flag_of

if TYPE_CHECKING:
    from megatron_profit.evaluation.questions import Task

# The folder of the tasks' files where no flag names one.
DATA = Path("data/eval")
_SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "samples", "max_new_tokens", "seed")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of how a question is written and its answer drawn."""
    add = parser.add_argument
    add("--temperature", type=float, help="0: the most likely token at each step.")
    add("--top-p", type=float, help="Draw from the most likely tokens of this probability.")
    add("--top-k", type=int, help="Draw from this many most likely tokens (0: all).")
    add("--max-new-tokens", type=int, help="Longest answer (default: the task's).")
    add("--seed", type=int, help="Seed of the draws (default 1234).")
    add(
        "--template-date",
        metavar="YYYY-MM-DD",
        help="The day that a chat template writes which asks for today's.",
    )


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of an evaluation."""
    add = parser.add_argument
    add("--tasks", default="", help="Names with commas between, for example gsm8k,math500,ifeval.")
    add(
        "--data",
        nargs="+",
        type=Path,
        default=[DATA],
        metavar="DIR",
        help=f"Folders with the tasks' files (default {DATA}).",
    )
    add(
        "--task-file",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="Questions of one's own: JSON lines, JSON, parquet, CSV. May be repeated (default none).",
    )
    add(
        "--task-columns",
        nargs="+",
        default=(),
        metavar="NAME=COLUMN",
        help="Columns of --task-file, for example question=Q answer=A.",
    )
    add(
        "--answer-pattern",
        metavar="REGEX",
        help="Its last match is the answer of a --task-file (default: boxed, or the last number).",
    )
    add("--limit", type=int, help="Ask this many questions of each task, the same for all models.")
    add("--preset", choices=PRESETS, help="Sampling settings of a paper, for each task.")
    add("--samples", type=int, help="Answers to each question (default 1, greedy).")
    add_sampling_flags(parser)
    add(
        "--engine",
        choices=("auto", "transformers", "vllm"),
        default="auto",
        help="auto: vLLM where it is installed and a GPU is there, else transformers.",
    )
    add("--server", metavar="URL", help="An OpenAI-compatible server that answers instead.")
    add("--concurrency", type=int, default=16, help="Requests at a time to the server.")
    add("--batch", type=int, default=32, help="Answers at a time with transformers.")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 where the device computes in it.",
    )
    add("--overwrite", action="store_true", help="Begin again where --out has other answers.")


def sampling_of(arguments: argparse.Namespace, task: str) -> Sampling:
    """Return the sampling settings of a task.

    Raises:
        EvaluationError: A value does not fit.
    """
    given = {name: getattr(arguments, name) for name in _SAMPLING_FLAGS}
    return choose_sampling(arguments.preset, task, given)


def template_day(arguments: argparse.Namespace) -> date | None:
    """Return the day of --template-date; None without it.

    Raises:
        EvaluationError: It is no day.
    """
    from megatron_profit.data.errors import DataError
    from megatron_profit.data.render.template_date import parse_day

    try:
        return parse_day(arguments.template_date)
    except DataError as error:
        raise EvaluationError(error) from error


def check_day_is_written(day: date | None, written: Iterable[date | None]) -> None:
    """Refuse a day that no chat template writes.

    Args:
        day: The day of --template-date.
        written: The day that each model's template writes, or None.

    Raises:
        EvaluationError: None of them writes it.
    """
    if day is not None and not any(written):
        raise EvaluationError(
            f"--template-date {day} is given, but no model's chat template writes a date; drop it"
        )


def check_out(out: Path) -> None:
    """Refuse a folder of results that can neither be written to nor made.

    Raises:
        EvaluationError: Names the place and the remedy.
    """
    if (problem := problem_of_place(out)) is not None:
        raise EvaluationError(f"--out {out}: {problem}")


def at_least_one(arguments: argparse.Namespace, name: str) -> int:
    """Return a flag's value, which must be positive."""
    value = getattr(arguments, name)
    if value < 1:
        raise EvaluationError(f"{flag_of(name)} is {value}; it must be at least 1")
    return int(value)


def labelled_models(given: Sequence[str]) -> dict[str, str]:
    """Return label -> model of arguments [LABEL=]MODEL. For example, runs/profit/hf is called "profit".

    Raises:
        EvaluationError: Two models have the same label, or a label is no name of a folder.
    """
    models: dict[str, str] = {}
    for text in given:
        label, equals, model = text.partition("=")
        if not equals or Path(text).exists():
            place = Path(text).resolve()
            label, model = place.parent.name if place.name == "hf" else place.name, text
        if not label or not model or label.startswith(".") or "/" in label:
            raise EvaluationError(f"{text!r} is not of the form LABEL=MODEL")
        if label in models:
            raise EvaluationError(
                f"two models are called {label!r}; write LABEL=MODEL with another label for each"
            )
        models[label] = model
    return models


def load_tasks(arguments: argparse.Namespace) -> list[tuple[Task, Sampling]]:
    """Return the tasks with their settings.

    Raises:
        EvaluationError: A name is unknown, a file is missing or lacks a column, a setting does not fit.
    """
    from megatron_profit.evaluation.questions import check_names, load_task, task_of_file

    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if not names and not arguments.task_file:
        raise EvaluationError("no task is given; give --tasks gsm8k,… or --task-file FILE")
    check_names(names)
    columns = column_names(arguments.task_columns)
    if (columns or arguments.answer_pattern) and not arguments.task_file:
        raise EvaluationError(
            "--task-columns and --answer-pattern are about a --task-file; give one"
        )
    if arguments.limit is not None:
        at_least_one(arguments, "limit")
    for name in names:
        sampling_of(arguments, name)
    tasks = [load_task(name, arguments.data, arguments.limit) for name in names]
    tasks += [
        task_of_file(file, columns, arguments.limit, arguments.answer_pattern)
        for file in arguments.task_file
    ]
    found = [task.name for task in tasks]
    if twice := next((name for name in found if found.count(name) > 1), None):
        raise EvaluationError(f"two tasks are called {twice}; rename the --task-file")
    return [(task, sampling_of(arguments, task.name)) for task in tasks]


def column_names(given: Sequence[str]) -> dict[str, str]:
    """Return the columns of arguments NAME=COLUMN."""
    from megatron_profit.evaluation.questions import ANSWER, QUESTION

    columns = {}
    for text in given:
        name, equals, column = text.partition("=")
        if name not in (QUESTION, ANSWER) or not equals or not column:
            raise EvaluationError(
                f"--task-columns {text!r}: it must be {QUESTION}=COLUMN or {ANSWER}=COLUMN"
            )
        columns[name] = column
    return columns
