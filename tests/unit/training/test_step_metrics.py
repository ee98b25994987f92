"""Intervals are sums over counts of all their steps, whatever each step had."""

from __future__ import annotations

import pytest
import torch

from megatron_profit.training.monitoring.step_metrics import Interval, StepMetrics


def test_micro_batches_of_a_step_are_added_and_divided_once():
    losses = [
        {"lm loss": torch.tensor([6.0, 3.0]), "kept fraction": torch.tensor([1.0, 3.0])},
        {"lm loss": torch.tensor([1.0, 1.0]), "kept fraction": torch.tensor([0.0, 1.0])},
    ]
    step = StepMetrics.reduce(losses, None)
    assert step.pairs() == {"lm loss": (7.0, 4.0), "kept fraction": (1.0, 4.0)}
    assert {name: float(v) for name, v in step.means().items()} == {
        "lm loss": 1.75,
        "kept fraction": 0.25,
    }
    assert step.local_values("lm loss") == [2.0, 1.0]


def test_a_value_without_a_count_is_refused():
    with pytest.raises(ValueError, match=r"'lm loss' is .*, not a sum with a count"):
        StepMetrics.reduce([{"lm loss": torch.tensor(1.0)}], None)


def test_an_interval_weighs_by_tokens_and_metrics_that_begin_late_are_not_diluted():
    interval = Interval()
    interval.add({"lm loss": (10.0, 10.0)}, skipped=False)
    interval.add({"lm loss": (90.0, 30.0), "mean ratio": (33.0, 30.0)}, skipped=False)
    interval.add({"lm loss": (float("nan"), 5.0)}, skipped=True)
    assert interval.means() == {"lm loss": 2.5, "mean ratio": pytest.approx(1.1)}
    assert (interval.steps, interval.skipped) == (3, 1)
    assert interval.total("mean ratio") == (33.0, 30.0)
    assert interval.total("absent") == (0.0, 0.0)


def test_the_balancing_loss_of_a_skipped_step_is_left_out():
    interval = Interval()
    for value, skipped in ((1.0, False), (float("nan"), True), (2.0, False)):
        interval.add({}, skipped=skipped)
        interval.add_module_losses({"load_balancing_loss": torch.tensor(value)}, skipped=skipped)
    assert interval.module_means() == {"load_balancing_loss": 1.5}


def test_sums_of_many_tokens_keep_their_last_digits():
    """In fp32 a count above 2^24 no longer grows by 1."""
    interval = Interval()
    for _ in range(3):
        interval.add({"supervised tokens": (float(2**24 + 1), 1.0)}, skipped=False)
    assert interval.total("supervised tokens") == (3.0 * (2**24 + 1), 3.0)
