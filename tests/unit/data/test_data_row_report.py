"""What is said about rows before the first step: how full they are, and what a step of them holds."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_profit.data import Group, PackingReport
from megatron_profit.data.sequences.order import RowOrder


def report(lengths: list[int], seq_length: int, packing: bool, weight: float = 1) -> PackingReport:
    """Of examples of these many positions, half of them (rounded down) trained."""
    positions = np.array(lengths)
    groups = [Group(np.arange(len(lengths)), weight)]
    order = RowOrder(positions, groups, capacity=seq_length, packing=packing)
    return PackingReport.of(order, positions, positions // 2, seq_length)


def test_a_step_is_told_in_records_tokens_and_steps_of_an_epoch():
    # 30 records of 100 positions: 10 to a row.
    packed = report([100] * 30, 1000, packing=True)
    assert packed.of_step(4) == (
        "a step of 4 rows holds 40.0 records on average, 4,000 tokens, 2,000 of them supervised; an epoch "
        "is 0.8 steps"
    )
    alone = report([100] * 30, 1000, packing=False)
    assert alone.of_step(4).startswith("a step of 4 rows holds 4.0 records on average, 400 tokens")


def test_a_weight_counts_in_what_a_step_holds():
    assert "an epoch is 5.0 steps" in report([100] * 30, 1000, packing=False, weight=2).of_step(12)


def test_rows_of_one_short_record_each_are_warned_about_with_what_packing_makes_of_them():
    warning = report([100] * 30, 1000, packing=False).warning
    assert "records fill 10.0% of the positions of rows" in warning
    assert "Drop --no-packing: 30 rows become 3, 100.0% filled" in warning
    assert "A row then holds 10.0 records; divide --global-batch-size by that" in warning


@pytest.mark.parametrize("packing", [True, False])
def test_rows_that_are_half_full_are_not_warned_about(packing):
    assert report([500, 501, 700], 1000, packing).warning is None


@pytest.mark.parametrize(("lengths", "packing"), [([100, 37], True), ([137], False)])
def test_where_packing_does_not_help_a_shorter_sequence_does(lengths, packing):
    warning = report(lengths, 1000, packing).warning
    assert "records fill 13.7% of the positions" in warning
    assert f"a shorter --seq-length than 1,000; the longest record takes {max(lengths)}" in warning


def test_packed_rows_are_more_than_half_full_unless_one_holds_all():
    """So that a warning about packed rows has one cause, and one remedy."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        lengths = generator.integers(1, 101, generator.integers(2, 20)).tolist()
        found = report(lengths, 100, packing=True)
        assert found.rows == 1 or found.efficiency > 0.5


def test_the_report_for_programs_has_all_of_it():
    found = report([100] * 30, 1000, packing=False).as_json()
    assert {**found, "efficiency": 0.1, "supervised_share": 0.5} == found
    assert (found["longest"], found["packed_rows"]) == (100, 3)
