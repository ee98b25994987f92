"""The warning about a run that keeps almost no token."""

from __future__ import annotations

import pytest
import torch

from megatron_profit.training.step.kept_fraction import KeptFractionMonitor


def feed(monitor: KeptFractionMonitor, kept: int, supervised: int, times: int) -> None:
    for _ in range(times):
        monitor.add(torch.tensor(kept), torch.tensor(supervised))


def test_it_warns_after_a_few_micro_batches_and_then_ever_less_often(capsys):
    monitor = KeptFractionMonitor()
    feed(monitor, 0, 50, times=3)
    assert capsys.readouterr().out == ""
    feed(monitor, 0, 50, times=1)
    told = capsys.readouterr().out
    assert told.startswith("WARNING: the objective kept 0 of the last 200 supervised tokens")
    feed(monitor, 0, 50, times=1000)
    told += capsys.readouterr().out
    assert told.count("\n") == 7, "after 4, 12, 28, 60, 124, 252 and 508 micro-batches"


@pytest.mark.parametrize(("kept", "supervised"), [(1, 100), (50, 50), (0, 0)])
def test_it_is_silent_where_there_is_nothing_to_say(capsys, kept, supervised):
    feed(KeptFractionMonitor(), kept, supervised, times=40)
    assert capsys.readouterr().out == ""
