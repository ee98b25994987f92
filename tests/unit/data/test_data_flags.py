"""Flags about records, written again as words of another command."""

from __future__ import annotations

import argparse

import pytest

from megatron_profit.data.flags import add_rendering_flags, rendering_words


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
