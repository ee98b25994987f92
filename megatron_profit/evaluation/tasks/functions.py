"""Functions that the YAML files of this folder name: lm-eval calls them with a record and its answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from megatron_profit.evaluation.graders import (
    Grade,
    grade_expression,
    grade_letter,
    grade_number,
    grade_pattern,
    is_number,
)
from megatron_profit.evaluation.tasks.sentences import followed_instructions

_WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def _results(grade: Grade) -> dict[str, Any]:
    return {
        "right": grade.right,
        "parsed": grade.extracted is not None,
        "extracted": grade.extracted,
    }


def gsm8k(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """Grade GSM8K; the reference ends with "#### 18"."""
    return _results(grade_number(results[0], doc["answer"].rpartition("####")[2].strip()))


def math500(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """Grade MATH-500."""
    return _results(grade_expression(results[0], doc["answer"]))


def competition(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """Grade AIME and AMC, whose answers are numbers."""
    return _results(grade_number(results[0], number_text(doc["answer"])))


def svamp(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """Grade SVAMP."""
    return _results(grade_number(results[0], number_text(doc["Answer"])))


def mawps(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """Grade MAWPS."""
    return _results(grade_number(results[0], number_text(doc["target"])))


def gpqa(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """Grade GPQA."""
    return _results(grade_letter(results[0], doc["letter"]))


def ifeval(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """Grade IFEval: right if every instruction is followed by the strict rules."""
    from megatron_profit.evaluation.graders import answer_part

    text = answer_part(results[0]).strip()
    found = followed_instructions(doc, text)
    return {
        "right": bool(found["prompt_level_strict_acc"]),
        "parsed": bool(text),
        "extracted": None,
        **{name: found[name] for name in sorted(found)},
    }


def own(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """Grade a task of the user's own: numbers as numbers, other answers as expressions or as text."""
    reference = reference_of(doc["answer"])
    grade = grade_number if is_number(reference) else grade_expression
    return _results(grade(results[0], reference))


def own_by_pattern(pattern: str) -> Callable[[Mapping[str, Any], list[str]], dict[str, Any]]:
    """Return a function that grades a task of the user's own by a regular expression."""

    def results_of(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
        return _results(grade_pattern(results[0], doc["answer"], pattern))

    return results_of


def reference_of(answer: str) -> str:
    """Return the final answer of a reference: after "####", boxed, or the whole text."""
    from megatron_profit.evaluation.graders import last_boxed

    _, mark, last = answer.rpartition("####")
    return last.strip() if mark else last_boxed(answer) or answer.strip()


def number_text(value: object) -> str:
    """Return a number as text. For example, 43.0 gives "43", and "025" stays."""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def gpqa_choices(docs: Any) -> Any:
    """Add the four choices in an order that follows from the question, and the letter of the right one."""
    return docs.map(_with_choices)


def _with_choices(doc: Mapping[str, Any]) -> dict[str, Any]:
    right = doc["Correct Answer"].strip()
    choices = [right, *(doc[name].strip() for name in _WRONG)]
    order = list(range(4))
    random.Random(doc["Question"]).shuffle(order)
    return {"choices": [choices[i] for i in order], "letter": "ABCD"[order.index(0)]}


def flat_mean(items: list[Any]) -> float:
    """Return the mean over all values of lists of booleans."""
    flat = [value for item in items for value in item]
    return sum(flat) / len(flat)
