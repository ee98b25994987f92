"""The layout that is printed for scripts."""

from __future__ import annotations

import pytest

from megatron_profit.commands.choose_layout import main

OLMO = ["--model", "OLMo-2-1124-7B", "--gpus", "8"]


def test_a_row_has_no_more_positions_than_the_model(capsys):
    assert main(OLMO) == 0
    printed = capsys.readouterr()
    assert main([*OLMO, "--seq-length", "4096"]) == 0
    assert capsys.readouterr() == printed
    assert main([*OLMO, "--seq-length", "8192"]) == 2
    assert "--seq-length 8192 is above the 4096 positions of the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--gpus 0", 2, "--gpus is 0; it must be at least 1"),
        ("--optimizer sgd", 2, "--optimizer sgd is not known to the estimate"),
        ("--gpus 1", 1, "such GPUs are enough"),
    ],
)
def test_what_has_no_layout_is_one_line(capsys, flags, code, message):
    assert main([*OLMO, *flags.split()]) == code
    assert message in capsys.readouterr().err
