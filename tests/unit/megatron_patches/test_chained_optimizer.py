"""Optimizer states of one optimizer as two understand them, and of two as one does."""

from __future__ import annotations

from megatron_profit.megatron_patches.optimizer.chained_optimizer import regrouped


def group(decay: float, experts: bool, **more: object) -> dict:
    return {"wd_mult": decay, "is_expert_parallel": experts, "step": 3, **more}


def test_the_same_number_changes_nothing():
    one, two = {"optimizer": {"param_groups": []}}, {0: {"optimizer": {}}, 1: {"optimizer": {}}}
    assert regrouped(one, 1) is one
    assert regrouped(two, 2) is two


def test_of_two_optimizers_for_one():
    state = {
        0: {"state": {"common_step": 3}, "param_groups": [group(0, False), group(1, False)]},
        1: {"state": {"common_step": 3}, "param_groups": [group(1, True)]},
        "state": {7: "moments"},
        "param_groups": [{"params": [7]}, {"params": [8]}],
    }
    assert regrouped(state, 1) == {
        "state": {"common_step": 3, 7: "moments"},
        "param_groups": [
            group(0, False, params=[7]),
            group(1, False, params=[8]),
            group(1, True, params=[]),
        ],
    }


def test_of_one_optimizer_for_two():
    state = {
        "optimizer": {"param_groups": [group(0, False), group(1, False)]},
        0: {"param_state": "dense"},
        1: {"param_state": "experts", "optimizer": {"param_groups": [{"params": [2]}]}},
    }
    both = [group(0, False), group(1, False), group(0, True), group(1, True)]
    dense, experts = regrouped(state, 2).values()
    assert dense == {"optimizer": {"param_groups": both}, "param_state": "dense"}
    params = [[2], [], [], []]
    expected = [{**g, "params": own} for g, own in zip(both, params, strict=True)]
    assert experts == {"optimizer": {"param_groups": expected}, "param_state": "experts"}
