"""The totals of a run: what is counted, and what a resumed run goes on from."""

from __future__ import annotations

import json
import math

import pytest

from megatron_profit.training.monitoring.run_totals import RunTotals


def counted() -> RunTotals:
    totals = RunTotals()
    totals.step = 2
    totals.add(tokens=100.0, supervised=40.0, kept=30.0)
    totals.add(tokens=50.0, supervised=10.0, kept=10.0)
    return totals


def test_steps_add_up_and_go_on_after_a_resume():
    resumed = RunTotals()
    resumed.restore(counted().to_json(), step=2)
    resumed.add(tokens=1, supervised=1, kept=0)
    found = (resumed.since, resumed.tokens, resumed.supervised_tokens, resumed.kept_tokens)
    assert found == (0, 151, 51, 40)


@pytest.mark.parametrize("saved", [{}, {"since": 0, "tokens": 5}, {"since": 0, "tokens": "5"}])
def test_a_checkpoint_without_totals_is_counted_from_its_step_on(saved):
    resumed = RunTotals()
    resumed.restore(saved, step=7)
    resumed.add(tokens=1, supervised=1, kept=1)
    assert (resumed.since, resumed.tokens) == (7, 1)


def test_the_last_line_keeps_finite_metrics():
    totals = counted()
    totals.note_line({"lm loss": 0.5, "objective": math.nan}, 3, 4)
    assert (totals.last, totals.last_steps) == ({"lm loss": 0.5}, [3, 4])
    assert "step" not in totals.to_json(), "the checkpoint names its step by itself"


def test_a_finished_run_that_is_started_again_has_its_last_line():
    totals = counted()
    totals.note_line({"lm loss": 0.5}, 1, 2)
    resumed = RunTotals()
    resumed.restore(json.loads(json.dumps(totals.to_json())), step=2)
    assert (resumed.last, resumed.last_steps) == ({"lm loss": 0.5}, [1, 2])
    resumed.note_line({"objective": 0.25}, 3, 4)
    assert (resumed.last, resumed.last_steps) == ({"objective": 0.25}, [3, 4])


@pytest.mark.parametrize(
    "line",
    [
        {"last": {"lm loss": 0.5}},
        {"last": {"lm loss": "0.5"}, "last_steps": [1, 2]},
        {"last": {"lm loss": 0.5}, "last_steps": ["1", 2]},
        {"last": [0.5], "last_steps": [1, 2]},
    ],
)
def test_a_damaged_last_line_does_not_come_back_and_the_counts_do(line):
    resumed = RunTotals()
    resumed.restore(counted().to_json() | {"last": None, "last_steps": None} | line, step=2)
    assert (resumed.last, resumed.last_steps, resumed.tokens) == ({}, [], 150)
