"""Evaluate models on tasks: avg@k and pass@k with intervals, paired differences, and every answer.

    megatron-profit evaluate runs/profit/hf --tasks gsm8k,math500,ifeval --data data/eval
    megatron-profit evaluate base=Qwen3-0.6B runs/profit/hf --tasks gsm8k --preset profit-qwen
    megatron-profit evaluate Qwen/Qwen3-0.6B --server http://127.0.0.1:8000 --tasks gsm8k --samples 8
    megatron-profit evaluate runs/sft/hf --task-file exam.jsonl --task-columns question=Q answer=A

A model is a HuggingFace folder, an adapter's folder or an id of the hub; with --server it is the server's
name of the model. The questions are asked zero-shot through its chat template. --out gets a folder for each
model with its answers (JSON lines), results.json, results.md, figure.png and, for two models or more,
answers.html. A run that was interrupted goes on from there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint_conversion.cli import FlagHelp
from checkpoint_conversion.engine.output import whole_file
from megatron_profit.evaluation.command_line import (
    add_evaluation_flags,
    at_least_one,
    check_day_is_written,
    check_out,
    labelled_models,
    load_tasks,
    template_day,
)
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.flags import OneList, flag_of
from megatron_profit.recipe.errors import LaunchError

if TYPE_CHECKING:
    from megatron_profit.evaluation.engines import Engine
    from megatron_profit.evaluation.engines.engine import EngineOptions
    from megatron_profit.evaluation.presentation.page import Answers
    from megatron_profit.evaluation.questions import Task
    from megatron_profit.evaluation.run import Result
    from megatron_profit.evaluation.sampling import Sampling

RESULTS, TABLE, FIGURE, PAGE = "results.json", "results.md", "figure.png", "answers.html"
# Flags that the settings for OpenCompass cannot hold, and why.
_NOT_IN_OPENCOMPASS = {
    "template_date": "writes today's date where a chat template asks for it",
    "limit": "asks all questions of a task",
    "seed": "would give one seed to all answers of a question, which would be the same",
    "server": "loads the models itself",
    "engine": "loads the models with vLLM",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=FlagHelp, allow_abbrev=False
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="[LABEL=]MODEL",
        help="HuggingFace folders or ids of the hub, the base first.",
    )
    parser.register("action", None, OneList)
    add_evaluation_flags(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/evaluation"),
        metavar="DIR",
        help="Folder of results.",
    )
    parser.add_argument(
        "--opencompass",
        type=Path,
        metavar="FILE.py",
        help="Write the settings of the same evaluation for OpenCompass, ask nothing.",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; return 1 for input that cannot be used."""
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.opencompass is not None:
            write_opencompass(arguments)
            return 0
        results = evaluate_models(arguments)
    except (EvaluationError, LaunchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from megatron_profit.evaluation.presentation.report import markdown

    print(f"\n{markdown(results)}\nwrote {arguments.out}")
    return 0


def write_opencompass(arguments: argparse.Namespace) -> None:
    """Write the file of --opencompass, and print the command that uses it.

    Raises:
        EvaluationError: OpenCompass cannot make this evaluation.
    """
    from megatron_profit.evaluation.opencompass import VERSION, opencompass_settings

    file: Path = arguments.opencompass
    for name, reason in _NOT_IN_OPENCOMPASS.items():
        if getattr(arguments, name) not in (None, "auto"):
            raise EvaluationError(f"--opencompass: OpenCompass {reason}; drop {flag_of(name)}")
    tasks = load_tasks(arguments)
    text = opencompass_settings(models_of(arguments), tasks, arguments.dtype)
    with whole_file(file) as stream:
        stream.write(text.encode())
    print(
        f"wrote {file}; with opencompass=={VERSION} and vllm installed:\nopencompass {shlex.quote(str(file))}"
    )


def evaluate_models(arguments: argparse.Namespace) -> list[Result]:
    """Evaluate all models on all tasks and write the results.

    Raises:
        EvaluationError: Input cannot be used; checked before the first model is loaded, where possible.
    """
    from megatron_profit.evaluation.engines.engine import EngineOptions, resolved

    models = models_of(arguments)
    check_out(arguments.out)
    if arguments.server is not None:
        for name in ("engine", "dtype"):
            if (value := getattr(arguments, name)) != "auto":
                raise EvaluationError(f"--{name} {value}: the server decides it; drop it")
    for name in ("batch", "concurrency"):
        at_least_one(arguments, name)
    tasks = load_tasks(arguments)
    options = resolved(
        EngineOptions(
            name=arguments.engine,
            server=arguments.server,
            batch=arguments.batch,
            dtype=arguments.dtype,
            concurrency=arguments.concurrency,
        )
    )
    days = days_of(models, arguments)
    results = [
        result
        for label, model in models.items()
        for result in evaluate_model(
            label, model, tasks, replace(options, day=days[label]), arguments
        )
    ]
    by_task = sorted(
        results, key=lambda result: [task.name for task, _ in tasks].index(result.task)
    )
    write_results(arguments.out, by_task, [task for task, _ in tasks])
    return by_task


def models_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Return label -> folder of each model, or the server's name of it.

    Raises:
        EvaluationError: A label cannot be used.
        LaunchError: There is no such model on the hub, or it can be neither read nor downloaded.
    """
    from megatron_profit.launch.hub import local_folder

    models = labelled_models(arguments.models)
    if arguments.server is not None:
        return models
    return {label: local_folder(model) for label, model in models.items()}


def days_of(models: Mapping[str, str], arguments: argparse.Namespace) -> dict[str, date | None]:
    """Check the models' folders, and return the day that each chat template writes, by label.

    Raises:
        EvaluationError: A folder cannot be used, a template needs a day, or the given day is not written.
    """
    day = template_day(arguments)
    if arguments.server is not None:
        if day is not None:
            raise EvaluationError(
                f"--template-date {day}: the server {arguments.server} writes the messages with the model's "
                "template and its own clock; drop it"
            )
        return dict.fromkeys(models)
    from megatron_profit.evaluation.engines.model_folder import check_model

    days = {label: check_model(model, day) for label, model in models.items()}
    check_day_is_written(day, days.values())
    return days


def evaluate_model(
    label: str,
    model: str,
    tasks: Sequence[tuple[Task, Sampling]],
    options: EngineOptions,
    arguments: argparse.Namespace,
) -> list[Result]:
    """Evaluate one model on all tasks; the model is loaded if there is a question to ask."""
    from megatron_profit.evaluation.engines.engine import choose_engine
    from megatron_profit.evaluation.engines.model_folder import fingerprint
    from megatron_profit.evaluation.records import Records
    from megatron_profit.evaluation.run import evaluate, records_file, result_of, settings_of

    identity = model if options.server is not None else fingerprint(model)
    engine: Callable[[], Engine] = cache(lambda: choose_engine(model, options))
    results = []
    for task, sampling in tasks:
        settings = settings_of(label, identity, task, sampling, options)
        file = records_file(arguments.out, label, task.name)
        with Records(file, settings).open(overwrite=arguments.overwrite) as records:
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
    from megatron_profit.evaluation.presentation.figure import draw_scores

    draw_scores(results, out / FIGURE)
