"""`--help` of the training entry: groups, marks, and Megatron's flags on demand."""

from __future__ import annotations

import re

import pytest

from megatron_profit.objectives import registry
from megatron_profit.ops import tiling
from megatron_profit.sft import help_text
from megatron_profit.training.arguments.command_line import REQUIRED, full_parser
from megatron_profit.training.arguments.derive import _DEFAULTS
from megatron_profit.training.step import kernel_flags

NATIVE = "native flags that a run needs or often has"


@pytest.fixture(autouse=True)
def _width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def groups(text: str) -> dict[str, str]:
    """Return the text of each group by its title."""
    parts = re.split(r"^(\S.*):\n(?=  -)", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def flags_of(text: str) -> list[str]:
    return re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", text, flags=re.MULTILINE)


def marked(text: str, flag: str, mark: str) -> bool:
    entry = re.search(rf"^  {flag}\b.*\n(?:   .*\n)*", text, flags=re.MULTILINE)[0]
    return mark in " ".join(entry.split())


def test_help_shows_groups_of_about_a_screen():
    found = groups(help_text(["--data", "x", "--help"]))
    assert list(found)[:3] == ["options", "model and run", "data"]
    assert list(found)[-1] == NATIVE
    assert all(text.count("\n") <= 60 for text in found.values())


def test_help_shows_each_flag_of_the_project_and_says_how_megatrons_are_shown():
    text = help_text(["-h"])
    found = groups(text)
    own = [flag for title, part in found.items() if title != NATIVE for flag in flags_of(part)]
    assert len(own) == len(set(own))
    parser = full_parser([])
    every = {action.option_strings[0] for action in parser._actions}
    titles = {group.title for group in parser._action_groups} & set(found)
    of_project = {
        action.option_strings[0]
        for group in parser._action_groups
        if group.title in titles
        for action in group._group_actions
    }
    assert of_project - {"-h"} == set(own) - {"--help", "--help-all"}
    assert set(flags_of(found[NATIVE])) <= every
    assert "--help-all shows all native flags as well" in text


def test_help_marks_required_flags_and_defaults():
    text = help_text(["--help"])
    for name in REQUIRED:
        assert marked(text, "--" + name.replace("_", "-"), "(required)"), name
    assert marked(text, "--objective", "(default profit)")
    assert marked(text, "--packing", "(default on)")
    assert marked(text, "--stall-steps", "(default 50)")
    for name in ("save_interval", "eval_interval"):
        assert marked(text, "--" + name.replace("_", "-"), f"(default {_DEFAULTS[name]})")


def test_help_all_shows_megatrons_flags_too():
    shown = flags_of(full_parser([]).format_help())
    assert {"--hf-model", "--prob-threshold", "--distributed-timeout-minutes"} <= set(shown)


def test_help_shows_options_of_an_objective_from_outside(tmp_path, monkeypatch):
    (tmp_path / "helpful.py").write_text(
        "from dataclasses import dataclass\n"
        "from megatron_profit.objectives import Objective, option\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Objective):\n"
        "    sharpness_of_mine: float = option('how sharp', default=2.5, type=float)\n"
        "    def evaluate(self, statistics):\n"
        "        return statistics\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_OBJECTIVES", dict(registry._OBJECTIVES))
    text = help_text(["--objective", "helpful:Mine", "--help"])
    assert marked(text, "--sharpness-of-mine", "(default 2.5)")


def test_help_with_an_unknown_objective_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        help_text(["--objective", "nobodys", "--help"])
    assert "--objective: unknown objective 'nobodys'" in capsys.readouterr().err


def test_a_command_line_without_help_goes_on():
    assert help_text(["--data", "x", "--hf-model", "y"]) is None


def test_choices_of_the_kernel_are_the_kernels():
    assert kernel_flags.BACKWARDS == tiling.BACKWARDS
