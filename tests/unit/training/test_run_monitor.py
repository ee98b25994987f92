"""What is printed of a step and of an event, and which records an event names."""

from __future__ import annotations

import re
from argparse import Namespace

import pytest
import torch

from megatron_profit.megatron_patches.callbacks import LoggedStep
from megatron_profit.training.monitoring import run_monitor
from megatron_profit.training.monitoring.guard_report import (
    Suspect,
    chosen_suspects,
    event_text,
)
from megatron_profit.training.monitoring.guards import Event, GuardOptions, Guards
from megatron_profit.training.monitoring.metrics_file import read_metrics
from megatron_profit.training.monitoring.run_monitor import RunMonitor, throughput
from megatron_profit.training.monitoring.step_metrics import Interval
from megatron_profit.training.process.console import StepReport, lines_to_print

GOOD = Suspect(rank=0, micro_batch=1, loss=2.0, finite=True, records=(0, 1))
BAD = Suspect(rank=3, micro_batch=2, loss=float("nan"), finite=False, records=(2,))
SEEN = Suspect(3, 1, 3.0, True, (), rejections=("found NaN in local grad norm",))


def name(record: int) -> str:
    return f"a.jsonl:{record + 1}"


@pytest.mark.parametrize(
    ("kind", "suspects", "chosen"),
    [
        ("non-finite loss", [GOOD, BAD], [BAD]),
        ("non-finite gradient", [GOOD, SEEN], [SEEN]),
        ("non-finite gradient", [GOOD, BAD], [GOOD, BAD]),
        ("spike", [GOOD, SEEN], [SEEN, GOOD]),
        ("empty batch", [GOOD, SEEN], [GOOD, SEEN]),
        ("stall", [GOOD, SEEN], [GOOD, SEEN]),
    ],
)
def test_the_likeliest_micro_batches_are_named(kind, suspects, chosen):
    assert chosen_suspects(Event(kind, "warn", ""), suspects) == chosen


def test_an_event_tells_what_where_and_what_follows():
    text = event_text(Event("non-finite loss", "stop", "the loss is NaN"), 5, [BAD, SEEN], name)
    lines = text.splitlines()
    assert lines[:4] == [
        "megatron_profit: guard: non-finite loss at step 5: the loss is NaN.",
        "  rank 3, micro-batch 2, loss not finite: a.jsonl:3",
        "  rank 3, micro-batch 1, lm loss 3: padding only",
        "    found NaN in local grad norm",
    ]
    assert "code 17" in lines[4]
    assert "--iterations-to-skip 5, and with --load" in lines[4]


def test_long_lists_are_cut():
    many = [Suspect(0, i, 1.0, True, tuple(range(10))) for i in range(1, 7)]
    text = event_text(Event("spike", "skip", "high"), 5, many, name)
    assert text.count("a.jsonl:8 and 2 more") == 4
    assert "and 2 more micro-batches" in text
    assert text.endswith("No optimizer step is taken; the run goes on.")


def test_throughput_is_of_the_whole_interval():
    interval = Interval(tokens=600.0, floating_point_operations=8e12)
    interval.add({"kept fraction": (30.0, 100.0)}, skipped=False)
    interval.add({"kept fraction": (50.0, 100.0)}, skipped=False)
    assert throughput(interval, 4.0, devices=2) == {
        "tokens per second": 150.0,
        "supervised tokens per second": 50.0,
        "kept tokens per second": 20.0,
        "model TFLOP/s per GPU": 1.0,
    }


@pytest.mark.parametrize("skipped", [False, True])
def test_the_line_can_be_read_and_parsed(skipped):
    values = {"learning rate": 1e-5, "loss scale": 1.0, "grad norm": 0.91}
    step = LoggedStep(12, skipped, values, 0.0, 0.0, {}, 1.5)
    metrics = {"lm loss": 6.1904321, "objective": -0.000012345678}
    speed = {
        "tokens per second": 4120.4,
        "supervised tokens per second": 2290.0,
        "kept tokens per second": 1932.0,
        "model TFLOP/s per GPU": 212.44,
        "peak memory GiB": 61.26,
    }
    line = StepReport(step, 600, metrics, speed, 1.5).line()
    assert line == (
        " iteration       12/     600 | lm loss: 6.190432 | objective: -1.234568E-05 | "
        "learning rate: 1E-05 | grad norm: 0.91 | "
        + ("no optimizer step | " if skipped else "")
        + "tokens/s: 4,120 (2,290 supervised, 1,932 kept) | TFLOP/s/GPU: 212.4 | "
        "peak memory: 61.3 GiB | elapsed time per iteration (ms): 1500.0 | left: 0:14:42 |"
    )
    assert re.findall(r"\| objective: (\S+) \|", line) == ["-1.234568E-05"]


def test_counts_have_all_their_digits():
    step = LoggedStep(12, False, {"grad norm": 0.91}, 0.0, 0.0, {}, 1.5)
    speed = dict.fromkeys(
        (
            *("tokens per second", "supervised tokens per second", "kept tokens per second"),
            *("model TFLOP/s per GPU", "peak memory GiB"),
        ),
        1.0,
    )
    metrics = {"supervised tokens": 123456789, "mean p": 0.123456789}
    line = StepReport(step, 600, metrics, speed, 1.5).line()
    assert "| supervised tokens: 123456789 | mean p: 0.1234568 |" in line


def test_what_a_terminal_obeys_in_a_name_is_shown_as_an_escape():
    text = event_text(
        Event("spike", "warn", "high"), 5, [GOOD], lambda record: f"\x1b[2Ja.jsonl:{record + 1}"
    )
    printed = lines_to_print(text)
    assert "\\x1b[2Ja.jsonl:1" in printed
    assert printed.isascii()
    assert printed.replace("\n", "").isprintable()
    assert printed.count("\n") == text.count("\n")


def test_a_metrics_file_that_cannot_be_written_is_told_once(tmp_path, monkeypatch, capsys):
    args = Namespace(iteration=0, objective="sft", world_size=1)
    monkeypatch.setattr(run_monitor, "get_args", lambda: args)
    monkeypatch.setattr(run_monitor, "_logs", lambda: True)
    file = tmp_path / "taken" / "metrics.jsonl"
    file.parent.write_text("")
    monitor = RunMonitor(Guards(GuardOptions()), name, file)
    for step in (1, 2):
        monitor._write("train", step, {})
    assert capsys.readouterr().out.count(f"{file} cannot be written (OSError 17") == 1
    file.parent.unlink()
    monitor._write("train", 3, {})
    assert [(r["kind"], r["step"]) for r in read_metrics(file)] == [("start", 0), ("train", 3)]


def test_what_megatron_rejects_in_a_backward_hook_counts_and_an_evaluation_does_not():
    monitor = RunMonitor(Guards(GuardOptions()), name)
    with torch.no_grad():  # hooks of --overlap-grad-reduce run like this, and so do evaluations
        assert monitor.rejected("found NaN in local forward loss calculation", fatal=True)
        monitor.before_train_step(None, 3)
        assert monitor.rejected("found Large gradient", fatal=False)
    assert monitor._rejections == [("found Large gradient", False)]
