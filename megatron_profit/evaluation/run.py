"""Evaluate one model on one task: ask what is not answered yet, grade, write down, estimate."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from megatron_profit.evaluation.engines import Answer, Engine, Request
from megatron_profit.evaluation.engines.engine import EngineOptions, description
from megatron_profit.evaluation.estimators import Estimate, average_at_k, mean_pass_at_k
from megatron_profit.evaluation.questions import Question, Task
from megatron_profit.evaluation.records import Records, Sample
from megatron_profit.evaluation.sampling import Sampling

_GRADED = ("right", "parsed", "extracted")
_EVERY_SECONDS = 10


@dataclass(frozen=True)
class Result:
    """The result of one model on one task.

    Attributes:
        model, task: Their names.
        average: avg@k.
        pass_at: k -> pass@k, for k of 1, 2, 4 … and the number of samples.
        unfinished: Share of answers that ended at the length limit.
        unparsed: Share of answers without a final answer.
        tokens: Mean tokens of an answer.
        metrics: The task's own metrics, by name.
        answers: Number of a question -> number of a sample -> the sample.
        sampling: The settings.
        engine: The engine's name.
    """

    model: str
    task: str
    average: Estimate
    pass_at: Mapping[int, float]
    unfinished: float
    unparsed: float
    tokens: float
    metrics: Mapping[str, float]
    answers: Mapping[int, Mapping[int, Sample]]
    sampling: Sampling
    engine: str

    @property
    def right(self) -> list[list[bool]]:
        """[Q][S] whether each sample is right."""
        return [
            [of_question[i].right for i in sorted(of_question)]
            for _, of_question in sorted(self.answers.items())
        ]


class Progress:
    """Lines on the progress of a task, with the time that is left.

    Args:
        label: What is evaluated, for example "base on gsm8k".
        total: Answers to come.
        show: Called with each line.
    """

    def __init__(self, label: str, total: int, show: Callable[[str], None]) -> None:
        self.label, self.total, self.show = label, total, show
        self.done, self.tokens = 0, 0
        self.start = self.shown = time.monotonic()

    def add(self, tokens: int) -> None:
        """Count an answer, and show a line if the last one is old or all is done."""
        self.done += 1
        self.tokens += tokens
        now = time.monotonic()
        if now - self.shown >= _EVERY_SECONDS or self.done == self.total:
            self.shown = now
            self.show(self.line(now - self.start))

    def line(self, seconds: float) -> str:
        """Return the line after this many seconds."""
        speed = self.tokens / seconds if seconds else 0.0
        left = seconds / self.done * (self.total - self.done)
        return (
            f"{self.label}: {self.done:,} of {self.total:,} answers, {speed:,.0f} tokens/s, "
            f"{_clock(seconds)} so far, {_clock(left)} left"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def print_line(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def settings_of(
    label: str, identity: str, task: Task, sampling: Sampling, options: EngineOptions
) -> dict[str, Any]:
    """Return everything that decides the answers, as the records keep it."""
    day = {} if options.day is None else {"template_date": str(options.day)}
    return {
        "model": label,
        "identity": identity,
        "task": task.name,
        "version": task.version,
        "questions": task.digest,
        "engine": description(options),
        **asdict(sampling),
        **day,
    }


def evaluate(
    task: Task,
    sampling: Sampling,
    records: Records,
    engine: Callable[[], Engine],
    *,
    label: str,
    show: Callable[[str], None] = print_line,
) -> None:
    """Ask the questions that have no answer yet, and write each graded answer into the open records.

    Earlier answers are graded again: the version that asked them may have graded otherwise.

    Args:
        task: The task.
        sampling: The settings.
        records: The open records, with the answers of an earlier run.
        engine: Returns the engine; called only if there is a question to ask.
        label: Name of the model.
        show: Receives the lines of progress.

    Raises:
        EvaluationError: The engine cannot go on.
    """
    missing = list(records.missing(task, sampling.samples))
    asked = len(task.questions) * sampling.samples
    there = asked - len(missing)
    begin = f", {there:,} of them are there" if there else ""
    show(f"{label} on {task.name}: {asked:,} answers{begin}")
    if changed := _grade_again(task, records):
        show(f"{label} on {task.name}: {changed:,} earlier answers have another grade now")
    longest = sampling.max_new_tokens or task.longest_answer
    requests = [
        Request(question.messages, (task.name, question.number, number), longest)
        for question, number in missing
    ]
    questions = {question.number: question for question in task.questions}
    if requests:
        progress = Progress(f"{label} on {task.name}", len(requests), show)
        for request, answer in engine().answers(requests, sampling):
            _, number, sample = request.place
            records.add(questions[number], graded(task, questions[number], sample, answer))
            progress.add(answer.tokens)
    records.finish(task)


def _grade_again(task: Task, records: Records) -> int:
    """Grade all answers in the open records again, and return how many are right or wrong only now."""
    changed = 0
    for question in task.questions:
        for i, sample in records.samples.get(question.number, {}).items():
            answer = Answer(sample.text, sample.tokens, sample.stopped)
            now = graded(task, question, i, answer)
            changed += now.right != sample.right
            records.samples[question.number][i] = now
    return changed


def graded(task: Task, question: Question, number: int, answer: Answer) -> Sample:
    """Return an answer with its grade."""
    grade = task.grade(question, answer.text)
    return Sample(
        number=number,
        text=answer.text,
        tokens=answer.tokens,
        stopped=answer.stopped,
        right=bool(grade["right"]),
        parsed=bool(grade["parsed"]),
        extracted=grade["extracted"],
        metrics={name: value for name, value in grade.items() if name not in _GRADED},
    )


def result_of(task: Task, sampling: Sampling, records: Records, *, label: str) -> Result:
    """Return the estimates from complete records."""
    answers = {
        question.number: {i: records.samples[question.number][i] for i in range(sampling.samples)}
        for question in task.questions
    }
    flat = [sample for of_question in answers.values() for sample in of_question.values()]
    right = [[s.right for s in of_question.values()] for of_question in answers.values()]
    powers = [2**i for i in range(sampling.samples.bit_length())]
    ks = dict.fromkeys([*powers, sampling.samples])
    return Result(
        model=label,
        task=task.name,
        average=average_at_k(right),
        pass_at={k: mean_pass_at_k(right, k) for k in ks},
        unfinished=mean(not sample.stopped for sample in flat),
        unparsed=mean(not sample.parsed for sample in flat),
        tokens=mean(sample.tokens for sample in flat),
        metrics=_means([sample.metrics for sample in flat]),
        answers=answers,
        sampling=sampling,
        engine=str(records.settings["engine"]),
    )


def _means(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of each metric; lists count with all of their values."""
    means = {}
    for name in metrics[0]:
        values = [
            value
            for of_sample in metrics
            for value in (
                of_sample[name] if isinstance(of_sample[name], list) else [of_sample[name]]
            )
        ]
        means[name] = mean(map(float, values))
    return means


def records_file(out: Path, label: str, task: str) -> Path:
    """Return the file of a model's answers to a task."""
    return out / label / f"{task}.jsonl"
