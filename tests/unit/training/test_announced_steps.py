"""What a run says of its steps before the first, on the first process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_profit.data import PackingReport
from megatron_profit.training.plan.datasets import SFTData, _tell_of_steps


@pytest.fixture
def told(capsys, monkeypatch):
    """told(examples, rows, batch_size): the lines, of rows of 100 positions and records of 20."""
    monkeypatch.setenv("RANK", "0")

    def tell(examples: int, rows: int, batch_size: int | None) -> list[str]:
        packed = -(-examples // 5)
        report = PackingReport(examples, rows, 100, 20 * examples, 10 * examples, 20, packed)
        _tell_of_steps(report, batch_size)
        return capsys.readouterr().out.splitlines()

    return tell


def test_a_run_of_full_rows_says_what_a_step_holds(told):
    (line,) = told(examples=50, rows=10, batch_size=4)
    assert line.startswith(
        "a step of 4 rows holds 20.0 records on average, 400 tokens, 200 of them"
    )


def test_steps_of_several_sizes_are_not_described(told):
    assert told(examples=50, rows=10, batch_size=None) == []


def test_the_last_step_of_a_schedule_finds_its_rows():
    """9 rows in steps of 2, 5 and 5, with one row more: Megatron's sampler wants one left after the end."""
    asked: list[int] = []
    rows = SimpleNamespace(with_samples=lambda count: asked.append(count) or SimpleNamespace())
    args = SimpleNamespace(
        step_batch_size_schedule="0:2 512:5",
        seq_length=256,
        micro_batch_size=1,
        data_parallel_size=1,
        global_batch_size=1,
        rank=1,
        eval_iters=0,
        train_iters=3,
        iteration=0,
        consumed_train_samples=0,
    )
    SFTData(rows, None, 1.0, None).provider(args)((9, 0, 0))
    assert asked[0] > 2 + 5 + 5


def test_padding_is_a_warning(told):
    _, line = told(examples=50, rows=50, batch_size=4)
    assert line.startswith("WARNING: records fill 20.0% of the positions of rows")


def test_a_step_of_more_rows_than_an_epoch_has_is_a_warning(told):
    packed = told(examples=10, rows=2, batch_size=8)[-1]
    assert packed == (
        "WARNING: an epoch has 2 rows, fewer than the 8 of a step: give a smaller --global-batch-size or a "
        "shorter --seq-length"
    )
    alone = told(examples=4, rows=4, batch_size=8)[-1]
    assert alone.endswith("give a smaller --global-batch-size")


def test_other_processes_are_silent(told, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert told(examples=4, rows=4, batch_size=8) == []
