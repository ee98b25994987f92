"""The warning about a run that keeps almost no token."""

from __future__ import annotations

import warnings

import pytest
import torch

from megatron_profit.training.step.kept_share import KeptShareMonitor


def feed(monitor: KeptShareMonitor, kept: int, supervised: int, times: int) -> None:
    for _ in range(times):
        monitor.add(torch.tensor(kept), torch.tensor(supervised))


def test_it_warns_after_a_few_micro_batches_and_then_ever_less_often():
    monitor = KeptShareMonitor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        feed(monitor, 0, 50, times=3)
        assert not caught
        feed(monitor, 0, 50, times=1)
        assert "kept 0 of the last 200 supervised tokens" in str(caught[0].message)
        feed(monitor, 0, 50, times=1000)
        assert len(caught) == 7, "after 4, 12, 28, 60, 124, 252 and 508 micro-batches"


@pytest.mark.parametrize(("kept", "supervised"), [(1, 100), (50, 50), (0, 0)])
def test_it_is_silent_where_there_is_nothing_to_say(kept, supervised):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(KeptShareMonitor(), kept, supervised, times=40)
