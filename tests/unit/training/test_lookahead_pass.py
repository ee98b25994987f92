"""The micro-batches of a forward-only pass are as many as Megatron's schedule takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_profit.megatron_patches.callbacks import TrainContext
from megatron_profit.training.statistics import lookahead_pass
from megatron_profit.training.statistics.lookahead_pass import LookaheadPass
from megatron_profit.training.statistics.token_table import TokenTable

STATISTICS = frozenset({"log_prob"})


@pytest.fixture
def passes(monkeypatch):
    """Return the rows of each pass over `count` global batches of 6 micro-batches, and the joined table."""
    args = SimpleNamespace(consumed_train_samples=24, micro_batch_size=2)
    monkeypatch.setattr(lookahead_pass, "get_args", lambda: args)
    # --decrease-batch-size-if-needed has made it 12, where a ramp is at 13.
    monkeypatch.setattr(lookahead_pass, "get_current_running_global_batch_size", lambda: 12)
    monkeypatch.setattr(lookahead_pass.mpu, "get_data_parallel_world_size", lambda: 1)

    def run(count: int, chunks: int, group: int, is_last_stage: bool = True):
        seen = []

        def score(context, rows, statistics, name):
            seen.append((rows.start, rows.stop))
            keys = torch.arange(rows.start, rows.stop)
            return TokenTable.of(keys, {"log_prob": keys / 10}) if is_last_stage else None

        look = LookaheadPass(None)
        look._train, look._of = object(), score
        config = SimpleNamespace(microbatch_group_size_per_vp_stage=group)
        table = look.of_next_batches(TrainContext([None] * chunks, config), count, STATISTICS)
        return seen, table

    return run


@pytest.mark.parametrize(("chunks", "group"), [(1, 4), (2, 2), (2, 3)])
def test_several_global_batches_are_one_pass_where_the_schedule_takes_them(passes, chunks, group):
    assert passes(3, chunks, group)[0] == [(24, 60)]


def test_else_each_global_batch_is_a_pass_as_in_training(passes):
    """6 micro-batches in groups of 5 leave 1 for a last group; 18 of them would leave 3, and 12 leave 2."""
    seen, table = passes(3, 2, 5)
    assert seen == [(24, 36), (36, 48), (48, 60)]
    assert sorted(table.keys.tolist()) == [*range(24, 60)]
    assert passes(3, 2, 5, is_last_stage=False)[1] is None
