"""The metrics file: one object a step, also behind a kill and a resume."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil

import pytest

from checkpoint_conversion.errors import ConversionError
from megatron_profit.training.monitoring.metrics_file import MetricsFile, read_metrics


def steps(path) -> list[tuple[str, int]]:
    return [(record["kind"], record["step"]) for record in read_metrics(path)]


def write(path, start: int, stop: int, value: float = 1.0) -> MetricsFile:
    file = MetricsFile(path, start)
    for step in range(start + 1, stop + 1):
        file.write("train", step, {"lm loss": value})
    return file


def test_a_resumed_run_tells_of_each_step_once(tmp_path):
    path = tmp_path / "new folder" / "metrics.jsonl"
    file = write(path, 0, 5)
    file.write("evaluation", 4, {})
    file.write("guard", 5, {})
    file = write(path, 3, 4, value=2.0)
    file.write("evaluation", 4, {})
    file.write("evaluation", 4, {})
    train = [("train", step) for step in range(1, 5)]
    assert steps(path) == [*train[:3], ("guard", 5), train[3], ("evaluation", 4)]
    assert [r.get("lm loss") for r in read_metrics(path)] == [1.0, 1.0, 1.0, None, 2.0, None]
    moved = path.with_name("metrics.jsonl.superseded")
    assert steps(moved) == [("train", 4), ("train", 5), ("evaluation", 4)]


def test_a_finished_run_that_is_started_again_changes_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 2).write("evaluation", 2, {"lm loss": 1.5})
    before = path.read_bytes()
    MetricsFile(path, 2).write("evaluation", 2, {"lm loss": 1.5})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", [1, 10, 25])
def test_a_line_that_was_cut_off_is_moved_away(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 3)
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps(path)[:2] == [("train", 1), ("train", 2)]
    write(path, 2, 3, value=2.0)
    assert steps(path) == [("train", 1), ("train", 2), ("train", 3)]
    assert [record["lm loss"] for record in read_metrics(path)] == [1.0, 1.0, 2.0]


def test_events_may_repeat_and_what_is_not_finite_becomes_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for _ in range(2):
        file.write("guard", 1, {"suspects": [{"loss": math.nan, "records": ("a:1",)}]})
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    expected = {"kind": "guard", "step": 1, "suspects": [{"loss": None, "records": ["a:1"]}]}
    assert json.loads(lines[0]) == expected


@pytest.mark.parametrize(
    "broken", ['{"step": 2}', '{"kind": "train", "step": "2"}', '{"kind": 1, "step": 2}', "[2]"]
)
def test_a_broken_line_in_the_middle_is_named(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n' + broken + "\n")
    with pytest.raises(ValueError, match="line 2: not an object with a kind and a step"):
        list(read_metrics(path))


@pytest.mark.parametrize("step", ['"2"', "null", "[]", "true", "1.5"])
def test_a_line_without_the_number_of_a_step_is_moved_away(tmp_path, step):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": ' + step + "}\n")
    write(path, 1, 2)
    assert steps(path) == [("train", 1), ("train", 2)]


def test_a_disk_that_is_full_takes_whole_lines_or_none(tmp_path, monkeypatch):
    """And the line after that, when there is space again."""
    path = tmp_path / "metrics.jsonl"
    file = write(path, 0, 2)
    real, left = os.write, [10]

    def nearly_full(descriptor: int, data: bytes) -> int:
        taken = data[: left[0]]
        left[0] -= len(taken)
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, taken)

    monkeypatch.setattr(os, "write", nearly_full)
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        file.write("train", 3, {"lm loss": 1.0})
    assert path.read_bytes() == before
    left[0] = 10**6
    file.write("train", 3, {"lm loss": 1.0})
    assert steps(path) == [("train", 1), ("train", 2), ("train", 3)]


def test_a_file_that_is_removed_is_begun_anew(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    file = write(path, 0, 2)
    path.unlink()
    file.write("train", 3, {})
    assert steps(path) == [("train", 3)]
    shutil.rmtree(path.parent)
    with pytest.raises(FileNotFoundError):
        file.write("train", 4, {})
    path.parent.mkdir()
    file.write("train", 5, {})
    assert steps(path) == [("train", 5)]


def test_links_are_not_written_through(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.symlink_to(mine)
    with pytest.raises(ConversionError, match=r"metrics\.jsonl is a symbolic link"):
        MetricsFile(path, 0)
    path.unlink()
    write(path, 0, 3)
    path.with_name("metrics.jsonl.superseded").symlink_to(mine)
    with pytest.raises(ConversionError, match=r"superseded is a symbolic link"):
        MetricsFile(path, 1)
    path.with_name("metrics.jsonl.superseded").unlink()
    path.with_name(".metrics.jsonl.unfinished").symlink_to(mine)
    MetricsFile(path, 1)
    assert steps(path) == [("train", 1)]
    assert mine.read_text() == "mine"


def test_a_pipe_is_no_metrics_file(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ConversionError, match="is a pipe; a regular file is needed"):
        MetricsFile(tmp_path / "metrics.jsonl", 0)
