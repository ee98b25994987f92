"""A run that a program of one's own starts with a list of flags, as docs/training.md shows."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "examples" / "data" / "arithmetic_base.jsonl"


def test_the_program_in_the_documentation_trains(ranks, tiny, tmp_path):
    """Its own command line holds other words, and stays as it is. Its callback sees each step."""
    page = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.split("## A run from Python")[1]
    program = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    script = tmp_path / "program.py"
    script.write_text(
        f"import os, sys\nos.chdir({str(tmp_path)!r})\n{program}\nprint('ended with', sys.argv[1:])\n"
    )
    shutil.copytree(tiny, tmp_path / "model")
    shutil.copy(DATA, tmp_path / "data.jsonl")
    result = ranks(1, script, "--objective", "of this program", "--train-iters", 99)
    assert "\n2 2\n" in result.stdout, "steps and layers of the plan"
    assert "ended with ['--objective', 'of this program', '--train-iters', '99']" in result.stdout
    announced = re.findall(r"^step (\d+) trained ([\d,]+) tokens$", result.stdout, re.MULTILINE)
    assert [step for step, _ in announced] == ["1", "2"]
    assert all(0 < int(tokens.replace(",", "")) <= 2 * 64 for _, tokens in announced)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(math.isfinite(line["lm loss"]) for line in steps)
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "2"
