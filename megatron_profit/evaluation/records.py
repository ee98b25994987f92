"""The answers of one model to one task, in a JSON Lines file that an interrupted run continues from.

The first line holds the settings. Each other line is a question with the samples answered so far. While a
run goes on, it adds a line for each answer, so that the end of a process loses only unfinished answers. At
the end, the file is written again with one line for each question.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from checkpoint_conversion.engine.lock import lock_file
from checkpoint_conversion.engine.output import whole_file
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.questions import Question, Task

SETTINGS = "settings"


@dataclass(frozen=True)
class Sample:
    """One answer to a question.

    Attributes:
        number: Which of the question's samples, from 0.
        text: The answer.
        tokens: Its number of tokens.
        stopped: Whether it ended by itself, and not at the length limit.
        right: Whether it is right.
        extracted: The final answer that was found, or None.
        parsed: Whether a final answer was found.
        metrics: The task's own metrics.
    """

    number: int
    text: str
    tokens: int
    stopped: bool
    right: bool
    parsed: bool
    extracted: str | None
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Records:
    """The file and its content.

    Attributes:
        file: The JSON Lines file.
        settings: Everything that decides the answers.
        samples: Number of a question -> number of a sample -> the sample.
    """

    file: Path
    settings: Mapping[str, Any]
    samples: dict[int, dict[int, Sample]] = field(default_factory=dict)
    _stream: BinaryIO | None = None

    @contextlib.contextmanager
    def open(self, *, overwrite: bool = False) -> Iterator[Records]:
        """Hold the file and open it for more answers, inside the block.

        Args:
            overwrite: Whether to begin again, else a file with the same settings is continued.

        Raises:
            EvaluationError: The file holds answers of another evaluation or is damaged, or another process
                writes it.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with lock_file(self.file.with_suffix(".lock"), patience=0):
                if overwrite:
                    self.file.unlink(missing_ok=True)
                if self.file.exists():
                    self._continue()
                else:
                    self._begin()
                with self.file.open("ab") as self._stream:
                    yield self
        except BlockingIOError as error:
            raise EvaluationError(
                f"{self.file}: another evaluation is writing it; wait for it, or give another --out"
            ) from error

    def _begin(self) -> None:
        with whole_file(self.file) as stream:
            stream.write(_line({"kind": SETTINGS, **self.settings}))

    def _continue(self) -> None:
        found, self.samples = read_records_file(self.file)
        if not self.samples:  # the run before has ended without an answer
            self._begin()
            return
        differing = [
            name
            for name in dict.fromkeys((*found, *self.settings))
            if found.get(name) != self.settings.get(name)
        ]
        if differing:
            told = "; ".join(
                f"{name} was {found.get(name)!r} and is {self.settings.get(name)!r}"
                for name in differing
            )
            raise EvaluationError(
                f"{self.file} holds answers of another evaluation ({told}); give another --out, or "
                "--overwrite to begin again"
            )
        content = self.file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # the last line was cut when the process ended
            with self.file.open("r+b") as stream:
                stream.truncate(whole)

    def missing(self, task: Task, count: int) -> Iterator[tuple[Question, int]]:
        """Yield the questions and samples that have no answer yet."""
        for question in task.questions:
            answered = self.samples.get(question.number, {})
            yield from ((question, i) for i in range(count) if i not in answered)

    def add(self, question: Question, sample: Sample) -> None:
        """Write an answer down at once."""
        assert self._stream is not None, "the records are not open"
        self.samples.setdefault(question.number, {})[sample.number] = sample
        self._stream.write(_line(_record(question, [sample])))
        self._stream.flush()

    def finish(self, task: Task) -> None:
        """Write the file again with one line for each question."""
        with whole_file(self.file) as stream:
            stream.write(_line({"kind": SETTINGS, **self.settings}))
            for question in task.questions:
                answered = self.samples.get(question.number, {})
                samples = [answered[number] for number in sorted(answered)]
                stream.write(_line(_record(question, samples)))


def _record(question: Question, samples: list[Sample]) -> dict[str, Any]:
    return {
        "kind": "question",
        "number": question.number,
        "question": "\n\n".join(message["content"] for message in question.messages),
        "reference": question.reference,
        "samples": [vars(sample) for sample in samples],
    }


def _line(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def read_records_file(file: Path) -> tuple[dict[str, Any], dict[int, dict[int, Sample]]]:
    """Return the settings and samples of a file; a last line without an end is left out.

    Raises:
        EvaluationError: The file is not one of answers, or a line of it is damaged.
    """
    lines = file.read_bytes().split(b"\n")[:-1]
    settings: dict[str, Any] = {}
    samples: dict[int, dict[int, Sample]] = {}
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            kind = value.pop("kind")
            if (number == 1) != (kind == SETTINGS):
                raise ValueError("the settings must be its first line")
            if kind == SETTINGS:
                settings = value
            else:
                of_question = samples.setdefault(value["number"], {})
                of_question |= {s["number"]: Sample(**s) for s in value["samples"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvaluationError(
                f"{file}, line {number}: is not a line of answers ({error}); give another --out, or "
                "--overwrite to begin again"
            ) from error
    if not settings:
        raise EvaluationError(
            f"{file}: holds no settings; give another --out, or --overwrite to begin again"
        )
    return settings, samples
