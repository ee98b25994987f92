"""The answers of several models as one self-contained HTML page, two models next to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from megatron_profit.evaluation.questions import Task
from megatron_profit.evaluation.records import Sample
from megatron_profit.token_report.embedding import with_data

# Answers of a model to a task: number of the question -> number of the sample -> the sample.
type Answers = Mapping[int, Mapping[int, Sample]]


def answers_page(
    tasks: Sequence[Task], answers: Mapping[str, Mapping[str, Answers]], *, subtitle: str = ""
) -> str:
    """Return the page.

    Args:
        tasks: The tasks with their questions.
        answers: Model -> task -> its answers; at least two models.
        subtitle: Plain text below the heading.

    Raises:
        ValueError: There are fewer than two models.
    """
    if len(answers) < 2:
        raise ValueError("the page compares two models; there is only one")
    data = {
        "subtitle": subtitle,
        "models": list(answers),
        "tasks": {
            task.name: [
                {
                    "number": question.number,
                    "question": "\n\n".join(m["content"] for m in question.messages),
                    "reference": question.reference,
                    "answers": {
                        model: _samples(of_model[task.name][question.number])
                        for model, of_model in answers.items()
                    },
                }
                for question in task.questions
            ]
            for task in tasks
        },
    }
    template = (
        files("megatron_profit.evaluation.presentation")
        .joinpath("page.html")
        .read_text(encoding="utf-8")
    )
    return with_data(template, data)


def _samples(samples: Mapping[int, Sample]) -> list[list[Any]]:
    return [
        [int(s.right), int(s.stopped), s.extracted, s.tokens, s.text]
        for _, s in sorted(samples.items())
    ]
