"""Flags about records: written again as words of another command, and given once."""

from __future__ import annotations

import argparse

import pytest

from megatron_profit.commands import evaluate, prepare_data, token_report
from megatron_profit.data import DataOptions
from megatron_profit.data.flags import (
    LIST_FLAGS,
    add_data_flags,
    add_rendering_flags,
    rendering_words,
)
from megatron_profit.flags import second_lists


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--no-train-think"],
        ["--data-columns", "prompt=question", "response=answer", "--template-date", "2026-01-02"],
        ["--dataset-info", "info.json", "--train-on", "each", "--allow-special-tokens", "<a>"],
    ],
)
def test_words_are_read_as_the_values_they_were_made_from(words):
    parser = argparse.ArgumentParser()
    add_rendering_flags(parser)
    assert rendering_words(vars(parser.parse_args(words))) == words


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (prepare_data.main, "--hf-model m --seq-length 8 --data a.jsonl --data b.jsonl"),
        (token_report.main, "--model m --terminal --data a.jsonl --data b.jsonl"),
        (evaluate.main, "m --tasks gsm8k --data a --data b"),
    ],
)
def test_a_second_list_is_refused(command, words, capsys):
    with pytest.raises(SystemExit):
        command(words.split())
    assert "--data is given twice, and the second list would replace" in capsys.readouterr().err


def test_the_lists_are_known():
    parser = argparse.ArgumentParser()
    add_data_flags(parser)
    lists = {action.option_strings[0] for action in parser._actions if action.nargs == "+"}
    assert lists == set(LIST_FLAGS)
    words = "--data a --seed 1 --seed 2 --data=b --data-columns prompt=--data".split()
    assert second_lists(words, LIST_FLAGS) == ["--data"]


def test_the_cache_may_be_in_the_home_folder(monkeypatch, tmp_path):
    """The shell leaves the tilde of --data-cache=~/data as it is, and so does a YAML file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = argparse.ArgumentParser()
    add_data_flags(parser)
    flags = vars(parser.parse_args(["--data", "a.jsonl", "--data-cache=~/data"]))
    assert DataOptions.from_flags(flags | {"seq_length": 8, "seed": 1}).cache == tmp_path / "data"
