"""Tasks of lm-eval in the YAML files of `tasks`: questions as chat messages, and the judgement of answers."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_profit.data.errors import BrokenRecord, DataError
from megatron_profit.evaluation.errors import EvaluationError, require
from megatron_profit.evaluation.graders import find_pattern
from megatron_profit.evaluation.tasks.functions import number_text, own_by_pattern
from megatron_profit.flags import nearest

TASKS = Path(__file__).parent / "tasks"
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz", ".jsonl.zst")
_OWN = TASKS / "_own.yaml"
# Columns of a task of the user's own.
QUESTION, ANSWER = "question", "answer"


@dataclass(frozen=True)
class Question:
    """One question of a task.

    Attributes:
        number: Its position in the task's file, from 0.
        messages: The chat messages that ask it.
        reference: The right answer as text; empty where rules judge the answer.
        doc: The record that the grader reads.
    """

    number: int
    messages: tuple[Mapping[str, str], ...]
    reference: str
    doc: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A task with its chosen questions.

    Attributes:
        name: For example "gsm8k".
        title: For tables, for example "GSM8K".
        version: Of the prompt and the grader.
        questions: The questions that are asked.
        longest_answer: Most new tokens of an answer, where the user or a preset sets no other limit.
        inner: lm-eval's task.
    """

    name: str
    title: str
    version: float | str
    questions: tuple[Question, ...]
    longest_answer: int
    inner: Any

    def grade(self, question: Question, text: str) -> dict[str, Any]:
        """Return `right`, `parsed`, `extracted` and the task's own metrics of an answer."""
        return dict(self.inner.process_results(question.doc, [text]))

    @property
    def digest(self) -> str:
        """Fingerprint of the chosen questions and their reference answers."""
        content = [(q.number, q.messages, q.reference, str(q.doc)) for q in self.questions]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def task_names() -> list[str]:
    """Return the names of the tasks that come with the package."""
    return sorted(file.stem for file in TASKS.glob("[!_]*.yaml"))


def check_names(names: Sequence[str]) -> None:
    """Check the names of tasks.

    Raises:
        EvaluationError: A name is unknown, or given twice.
    """
    known = task_names()
    for name in names:
        if name not in known:
            hint = nearest(name, known, cutoff=0.6) or "."
            raise EvaluationError(
                f"there is no task {name!r}{hint} The tasks are {', '.join(known)}; --task-file FILE "
                "asks the questions of a file"
            )
        if names.count(name) > 1:
            raise EvaluationError(f"the task {name} is given twice; name it once")


def load_task(name: str, folders: Sequence[Path], limit: int | None = None) -> Task:
    """Load a task of the package; its questions come from a file in one of the folders.

    Args:
        name: One of `task_names()`.
        folders: Where the task's file is looked for.
        limit: Ask this many questions, the same for every model; None for all.

    Raises:
        EvaluationError: The file is missing, cannot be read, or lacks a column.
    """
    config = _read_yaml(TASKS / f"{name}.yaml")
    file = _find_file(config, folders)
    return _task(config, _records(file, config["metadata"]["columns"]), limit)


def _find_file(config: Mapping[str, Any], folders: Sequence[Path]) -> Path:
    """Return the file of a task of the package, in the first folder that has it."""
    stem = Path(config["dataset_kwargs"]["data_files"]["test"]).stem
    for folder in folders:
        for suffix in SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    raise EvaluationError(
        f"the task {config['task']} needs the file {stem}.jsonl (or .json, .parquet, .csv) in "
        f"{' or '.join(map(str, folders))}; give its folder with --data. "
        f"Source: {config['metadata']['source']}; columns: {', '.join(config['metadata']['columns'])}"
    )


def task_of_file(
    file: Path,
    columns: Mapping[str, str],
    limit: int | None = None,
    pattern: str | None = None,
) -> Task:
    """Return a task over a file of the user's own.

    Args:
        file: JSON lines, JSON, parquet or CSV, as training data.
        columns: "question" and "answer" -> names of the file's columns.
        limit: See `load_task`.
        pattern: Regular expression whose last match is the answer, in an answer and in the reference. None
            looks for a boxed answer or a number, see `graders`.

    Raises:
        EvaluationError: The file cannot be read, or lacks a column; the pattern cannot be used, or matches
            no part of a reference.
    """
    names = {name: columns.get(name, name) for name in (QUESTION, ANSWER)}
    records = [
        {
            name: _text(record[column], f"{file}, record {number}", column)
            for name, column in names.items()
        }
        for number, record in enumerate(_records(file, list(names.values())), 1)
    ]
    config = _read_yaml(_OWN)
    config["task"] = config["metadata"]["title"] = name_of_file(file)
    if pattern is not None:
        for number, record in enumerate(records, 1):
            record[ANSWER] = _reference(record[ANSWER], pattern, f"{file}, record {number}")
        config["process_results"] = own_by_pattern(pattern)
        # It is a part of the grader.
        config["metadata"]["version"] = f"{config['metadata']['version']}, {pattern}"
    return _task(config, records, limit)


def name_of_file(file: Path) -> str:
    """Return the name of a task of the user's own. For example, `exam.v2.jsonl` gives "exam"."""
    return file.name.split(".")[0]


def _reference(answer: str, pattern: str, where: str) -> str:
    try:
        found = find_pattern(answer, pattern)
    except re.error as error:
        raise EvaluationError(
            f"--answer-pattern {pattern!r} is no regular expression: {error}"
        ) from error
    if found is None:
        raise EvaluationError(
            f"{where}: --answer-pattern {pattern!r} matches no part of the reference answer "
            f"{answer[-100:]!r}; correct the pattern or remove the record"
        )
    return found


def _text(value: Any, where: str, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise EvaluationError(
            f"{where}: the column {column!r} holds {type(value).__name__}; it must hold text or numbers"
        )
    text = number_text(value)
    if not text.strip() or (isinstance(value, float) and not math.isfinite(value)):
        raise EvaluationError(
            f"{where}: the column {column!r} is {text!r}; fill it in or remove the record"
        )
    return text


def _records(file: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the records of a file, which must all have the columns."""
    from megatron_profit.data import read_records

    records = []
    try:
        for record in read_records(file):
            if record.broken is not None:
                raise EvaluationError(_broken(record.where, record.broken))
            if lacking := [name for name in columns if record.value.get(name) is None]:
                raise EvaluationError(_lacking(record.where, lacking, record.value))
            records.append({name: record.value[name] for name in columns})
    except DataError as error:
        raise EvaluationError(error) from error
    return records


def _broken(where: str, problem: BrokenRecord) -> str:
    if problem.detail.startswith(where):  # it names the place itself, and the remedy
        return problem.detail
    return f"{where}: {problem}; correct or remove it"


def _lacking(where: str, columns: Sequence[str], record: Mapping[str, Any]) -> str:
    if empty := [name for name in columns if name in record]:
        return f"{where}: {' and '.join(map(repr, empty))} is null; fill it in or remove the record"
    return (
        f"{where}: has no {' and no '.join(map(repr, columns))}; the record has "
        f"{', '.join(map(repr, record))}. --task-columns names the columns of a --task-file"
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    require("lm_eval", "math_verify", for_what="an evaluation")
    # Its log tells how to call lm-eval's own command.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(file)


def _task(config: dict[str, Any], records: Sequence[dict[str, Any]], limit: int | None) -> Task:
    inner = _inner_task(config, records)
    docs = list(inner.test_docs())
    chosen: Sequence[int] = range(len(docs))
    if limit is not None and limit < len(docs):
        chosen = sorted(random.Random(config["task"]).sample(chosen, limit))
    return Task(
        name=config["task"],
        title=config["metadata"]["title"],
        version=config["metadata"]["version"],
        questions=tuple(_question(inner, number, docs[number]) for number in chosen),
        longest_answer=config["generation_kwargs"]["max_gen_toks"],
        inner=inner,
    )


def _inner_task(config: dict[str, Any], records: Sequence[dict[str, Any]]) -> Any:
    import datasets
    from lm_eval.api.task import ConfigurableTask

    datasets.disable_progress_bars()
    try:
        docs = {config["test_split"]: datasets.Dataset.from_list(list(records))}
        return ConfigurableTask(config={**config, "custom_dataset": lambda **_: docs})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise EvaluationError(
            f"the file of the task {config['task']} cannot be used ({error}); a column must hold the "
            "same kind of value in every record"
        ) from error


def _question(inner: Any, number: int, doc: Mapping[str, Any]) -> Question:
    history = inner.fewshot_context(
        doc,
        num_fewshot=0,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        # The engine applies the model's template.
        chat_template=lambda messages, add_generation_prompt: json.dumps(messages),
    )
    return Question(number, tuple(json.loads(history)), _reference_text(inner, doc), doc)


def _reference_text(inner: Any, doc: Mapping[str, Any]) -> str:
    """Return the reference as text; lm-eval would read one such as "[-2,7]" as a list of Python."""
    from lm_eval.utils import apply_template

    template = inner.config.doc_to_target
    return apply_template(template, dict(doc)) if isinstance(template, str) else ""
