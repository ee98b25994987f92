"""Parameter groups of a checkpoint are found by their parameters, whatever the learning rates."""

from __future__ import annotations

import copy

from megatron_profit.megatron_patches.optimizer.param_groups import adapt_groups


def groups(lr: float, beta2: float = 0.95, step: int = 0) -> list[dict]:
    """As Megatron makes them: matrices, vectors without weight decay."""
    common = {
        "lr_mult": 1.0,
        "is_decoupled_lr": False,
        "is_expert_parallel": False,
        "max_lr": lr,
        "min_lr": 0.0,
        "betas": (0.9, beta2),
        "step": step,
        "default_config": True,
    }
    return [
        {**common, "wd_mult": 1.0, "params": [0, 1]},
        {**common, "wd_mult": 0.0, "params": [2]},
    ]


def test_the_numbers_of_the_flags_win_and_the_state_stays():
    current, saved = groups(5e-4, beta2=0.5), groups(1e-3, step=6)[::-1]
    before = copy.deepcopy(current)
    adapt_groups(current, saved, keep_saved=False)
    assert current == before
    assert [group["max_lr"] for group in saved] == [5e-4, 5e-4]
    assert [group["betas"] for group in saved] == [(0.9, 0.5)] * 2
    assert [group["step"] for group in saved] == [6, 6]
    assert [group["params"] for group in saved] == [[2], [0, 1]]
    assert [group["wd_mult"] for group in saved] == [0.0, 1.0]


def test_the_schedule_of_the_checkpoint_wins_where_it_is_asked_for():
    current, saved = groups(5e-4), groups(1e-3, step=6)
    before = copy.deepcopy(saved)
    adapt_groups(current, saved, keep_saved=True)
    assert saved == before
    assert [group["max_lr"] for group in current] == [1e-3, 1e-3]


def test_embedding_and_output_may_have_a_learning_rate_of_their_own():
    def decoupled(rate: float) -> list[dict]:
        first, *rest = groups(1e-3)
        return [first, {**first, "max_lr": rate, "default_config": False}, *rest]

    saved = decoupled(1e-4)
    adapt_groups(decoupled(2e-4), saved, keep_saved=False)
    assert [group["max_lr"] for group in saved] == [1e-3, 2e-4, 1e-3]


def test_groups_without_a_single_counterpart_are_left_to_megatron():
    current = groups(5e-4)
    saved = [*groups(1e-3), *groups(2e-3), {**groups(3e-3)[0], "is_expert_parallel": True}]
    before = copy.deepcopy(saved)
    adapt_groups(current, saved, keep_saved=False)
    assert saved == before
