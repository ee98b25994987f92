"""Evaluate models on tasks: avg@k and pass@k with intervals, paired differences, and every answer.

    megatron-profit evaluate runs/profit/hf --tasks gsm8k,math500,ifeval --data data/eval
    megatron-profit evaluate base=Qwen3-0.6B runs/profit/hf --tasks gsm8k --preset profit-qwen
    megatron-profit evaluate Qwen/Qwen3-0.6B --server http://127.0.0.1:8000 --tasks gsm8k --samples 8
    megatron-profit evaluate runs/sft/hf --task-file exam.jsonl --task-columns question=Q answer=A

A model is a HuggingFace folder or an adapter's folder; with --server it is the server's name of the model.
The questions are asked zero-shot through its chat template. --out gets a folder for each model with its
answers (JSON lines), results.json, results.md, figure.png (with the extra "plot") and, for two models or
more, answers.html. A run that was interrupted goes on from there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint_conversion.engine.output import whole_file
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.sampling import PRESETS, Sampling, choose_sampling

if TYPE_CHECKING:
    from megatron_profit.evaluation.engines import Engine
    from megatron_profit.evaluation.engines.engine import EngineOptions
    from megatron_profit.evaluation.presentation.page import Answers
    from megatron_profit.evaluation.questions import Task
    from megatron_profit.evaluation.run import Result

RESULTS, TABLE, FIGURE, PAGE = "results.json", "results.md", "figure.png", "answers.html"
_SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "samples", "max_new_tokens", "seed")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of how an answer is drawn."""
    add = parser.add_argument
    add("--temperature", type=float, help="0: the most likely token at each step")
    add("--top-p", type=float, help="draw from the most likely tokens of this probability")
    add("--top-k", type=int, help="draw from this many most likely tokens (0: all)")
    add("--max-new-tokens", type=int, help="longest answer (default: the task's)")
    add("--seed", type=int, help="seed of the draws (default: 1234)")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="[LABEL=]MODEL", help="HuggingFace folders, base first")
    add("--tasks", default="", help="names with commas between, for example gsm8k,math500,ifeval")
    add(
        "--data",
        nargs="+",
        type=Path,
        default=[Path("data/eval")],
        metavar="DIR",
        help="folders with the tasks' files (default: data/eval)",
    )
    add(
        "--task-file",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="questions of one's own: JSON lines, JSON or parquet; may be repeated",
    )
    add(
        "--task-columns",
        nargs="+",
        default=[],
        metavar="NAME=COLUMN",
        help="columns of --task-file, for example question=Q answer=A",
    )
    add(
        "--answer-pattern",
        metavar="REGEX",
        help="its last match is the answer of a --task-file (default: boxed, or the last number)",
    )
    add("--limit", type=int, help="ask this many questions of each task, the same for all models")
    add("--preset", choices=PRESETS, help="sampling settings of a paper, for each task")
    add("--samples", type=int, help="answers to each question (default: 1, greedy)")
    add_sampling_flags(parser)
    add(
        "--engine",
        choices=("auto", "transformers", "vllm"),
        default="auto",
        help="auto: vLLM where it is installed and a GPU is there, else transformers",
    )
    add("--server", metavar="URL", help="an OpenAI-compatible server that answers instead")
    add("--concurrency", type=int, default=16, help="requests at a time to the server")
    add("--batch", type=int, default=32, help="answers at a time with transformers")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 where the device computes in it",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/evaluation"),
        metavar="DIR",
        help="folder of results (default: runs/evaluation)",
    )
    add("--overwrite", action="store_true", help="begin again where --out has other answers")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; return 1 for input that cannot be used."""
    arguments = build_parser().parse_args(argv)
    try:
        results = evaluate_models(arguments)
    except EvaluationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from megatron_profit.evaluation.presentation.report import markdown

    print(f"\n{markdown(results)}\nwrote {arguments.out}")
    return 0


def evaluate_models(arguments: argparse.Namespace) -> list[Result]:
    """Evaluate all models on all tasks and write the results.

    Raises:
        EvaluationError: Input cannot be used; checked before the first model is loaded, where possible.
    """
    from megatron_profit.evaluation.engines.engine import EngineOptions, resolved

    models = labelled_models(arguments.models)
    options = resolved(
        EngineOptions(
            name=arguments.engine,
            server=arguments.server,
            batch=at_least_one(arguments, "batch"),
            dtype=arguments.dtype,
            concurrency=at_least_one(arguments, "concurrency"),
        )
    )
    samplings = SamplingOfTasks(arguments)
    tasks = load_tasks(arguments, samplings)
    if arguments.server is None:
        from megatron_profit.evaluation.engines.model_folder import check_model

        for model in models.values():
            check_model(model)
    results = [
        result
        for label, model in models.items()
        for result in evaluate_model(label, model, tasks, options, arguments)
    ]
    by_task = sorted(
        results, key=lambda result: [task.name for task, _ in tasks].index(result.task)
    )
    write_results(arguments.out, by_task, [task for task, _ in tasks])
    return by_task


class SamplingOfTasks:
    """The sampling settings of a command line, for each task."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.preset = arguments.preset
        self.given = {name: getattr(arguments, name) for name in _SAMPLING_FLAGS}

    def of(self, task: str) -> Sampling:
        """Return the settings of a task."""
        return choose_sampling(self.preset, task, self.given)


def at_least_one(arguments: argparse.Namespace, name: str) -> int:
    """Return a flag's value, which must be positive."""
    value = getattr(arguments, name)
    if value < 1:
        raise EvaluationError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
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


def load_tasks(
    arguments: argparse.Namespace, samplings: SamplingOfTasks
) -> list[tuple[Task, Sampling]]:
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
        samplings.of(name)
    tasks = [load_task(name, arguments.data, arguments.limit) for name in names]
    tasks += [
        task_of_file(file, columns, arguments.limit, arguments.answer_pattern)
        for file in arguments.task_file
    ]
    found = [task.name for task in tasks]
    if twice := next((name for name in found if found.count(name) > 1), None):
        raise EvaluationError(f"two tasks are called {twice}; rename the --task-file")
    return [(task, samplings.of(task.name)) for task in tasks]


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


def evaluate_model(
    label: str,
    model: str,
    tasks: Sequence[tuple[Task, Sampling]],
    options: EngineOptions,
    arguments: argparse.Namespace,
) -> list[Result]:
    """Evaluate one model on all tasks; the model is loaded if there is a question to ask."""
    from megatron_profit.evaluation.engines.engine import choose_engine, description
    from megatron_profit.evaluation.engines.model_folder import fingerprint
    from megatron_profit.evaluation.records import Records
    from megatron_profit.evaluation.run import evaluate, records_file, result_of, settings_of

    identity = model if options.server is not None else fingerprint(model)
    engine: Callable[[], Engine] = cache(lambda: choose_engine(model, options))
    results = []
    for task, sampling in tasks:
        settings = settings_of(label, identity, task, sampling, description(options))
        file = records_file(arguments.out, label, task.name)
        if arguments.overwrite:
            file.unlink(missing_ok=True)
        with Records(file, settings) as records:
            evaluate(task, sampling, records, engine, label=label)
        results.append(result_of(task, sampling, records, label=label))
    return results


def write_results(out: Path, results: Sequence[Result], tasks: Sequence[Task]) -> None:
    """Write results.json, results.md, the figure, and the page where there are two models."""
    from megatron_profit.evaluation.presentation.page import answers_page
    from megatron_profit.evaluation.presentation.report import as_json, markdown

    contents = {
        RESULTS: json.dumps(as_json(results), indent=1) + "\n",
        TABLE: markdown(results),
    }
    answers: dict[str, dict[str, Answers]] = {}
    for result in results:
        answers.setdefault(result.model, {})[result.task] = result.answers
    if len(answers) > 1:
        settings = "; ".join(
            dict.fromkeys(f"{result.task}: {result.sampling}" for result in results)
        )
        contents[PAGE] = answers_page(tasks, answers, subtitle=settings)
    for name, text in contents.items():
        with whole_file(out / name) as stream:
            stream.write(text.encode())
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no {FIGURE}: run pip install 'megatron-profit[plot]'", file=sys.stderr)
        return
    from megatron_profit.evaluation.presentation.figure import draw_scores

    draw_scores(results, out / FIGURE)
