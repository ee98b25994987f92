"""The section `evaluate:` of a run's file, as flags of a training."""

import shlex
from datetime import date

import pytest

from megatron_profit.evaluation.after_training import _Parser
from megatron_profit.evaluation.command_line import add_evaluation_flags
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.recipe.evaluate_section import evaluation_words


def flags_of(section):
    """Return the flags of the evaluation as its own parser reads them."""
    (word,) = [word for word in evaluation_words(section) if word.startswith("--eval-flags=")]
    parser = _Parser(add_help=False, allow_abbrev=False)
    add_evaluation_flags(parser)
    return parser.parse_args(shlex.split(word.removeprefix("--eval-flags=")))


def test_a_value_that_begins_with_a_dash_stays_a_value():
    found = flags_of({"task_file": "exam.jsonl", "answer_pattern": "-?[0-9]+"})
    assert found.answer_pattern == "-?[0-9]+"
    assert flags_of({"tasks": "gsm8k", "temperature": 0.5}).temperature == 0.5


def test_several_files_are_several_flags_and_a_list_is_one():
    found = flags_of(
        {"task_file": ["a.jsonl", "-b.jsonl"], "task_columns": ["question=Q", "answer=A"]}
    )
    assert [str(file) for file in found.task_file] == ["a.jsonl", "-b.jsonl"]
    assert found.task_columns == ["question=Q", "answer=A"]


def test_a_day_is_written_as_the_flag_has_it():
    assert (
        flags_of({"tasks": "gsm8k", "template_date": date(2026, 2, 3)}).template_date
        == "2026-02-03"
    )


def test_a_list_for_a_flag_of_one_value_is_refused():
    with pytest.raises(LaunchError, match=r"samples has \[4, 8\]; it takes one value"):
        evaluation_words({"tasks": "gsm8k", "samples": [4, 8]})
