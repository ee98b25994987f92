"""Objectives that keep the top share of a ranking."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_profit.objectives import TokenStatistics, build_objective, kept_count, top_share


@given(
    scores=st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0, math.inf]), max_size=40),
    share=st.integers(1, 100),
)
def test_top_share_keeps_the_first_of_a_stable_ranking(scores, share):
    kept = top_share(torch.tensor(scores), share / 100)
    count = -(-share * len(scores) // 100)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: ties by position
    assert kept.nonzero().flatten().tolist() == sorted(order[:count])


def test_the_share_counts_as_it_is_written():
    assert 0.07 * 100 > 7, "what a product of floats would round up to 8"
    assert kept_count(0.07, 100) == 7
    assert [kept_count(0.2, n) for n in (0, 1, 5, 6, 10)] == [0, 1, 1, 2, 2]
    assert kept_count(1.0, 13) == 13


def test_a_nan_ranks_first_so_that_it_shows():
    assert top_share(torch.tensor([3.0, math.nan, 1.0]), 0.3).tolist() == [False, True, False]


def test_entropy_trains_the_least_certain_tokens():
    log_prob = torch.tensor([-1.0, -math.inf, -3.0, -math.inf, -0.5])
    entropy = torch.tensor([2.0, 5.0, 4.0, 0.1, 3.0])
    output = build_objective("entropy", keep_fraction=0.4)(
        TokenStatistics(log_prob, entropy=entropy)
    )
    assert output.weight.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]
    assert output.loss.tolist() == [0.0, math.inf, 3.0, 0.0, 0.0], "a dropped token adds nothing"


def test_a_ranking_of_the_global_batch_comes_from_outside():
    objective = build_objective("entropy", rank_scope="global_batch")
    assert objective.required_statistics == {"selected"}
    assert objective.score_statistics == {"entropy"}
    log_prob = torch.tensor([-1.0, -2.0, -3.0])
    with pytest.raises(ValueError, match="needs the statistic selected"):
        objective(TokenStatistics(log_prob, entropy=-log_prob))
    selected = torch.tensor([True, False, True])
    output = objective(TokenStatistics(log_prob, selected=selected))
    assert output.weight.tolist() == [1.0, 0.0, 1.0]
    assert output.loss.tolist() == [1.0, 0.0, 3.0]


@pytest.mark.parametrize("name", ["entropy", "rho1"])
def test_a_look_ahead_ranks_as_a_single_micro_batch_does(name):
    torch.manual_seed(0)
    vectors = {"entropy": torch.rand(40), "ref_log_prob": -torch.rand(40)}
    whole = TokenStatistics(-torch.rand(40), **vectors)
    objective = build_objective(name, keep_fraction=0.3, rank_scope="global_batch")
    reads = build_objective(name).required_statistics
    assert objective.lookahead == {"selected": reads}
    assert objective.needed_statistics == {"selected", *reads}
    decided = objective.look_ahead(whole)
    kept = build_objective(name, keep_fraction=0.3)(whole).weight
    assert torch.equal(objective(whole.replaced(**decided)).weight, kept)
    assert build_objective(name).look_ahead(whole) == {}


@pytest.mark.parametrize("share", [0, -0.1, 1.0001, math.nan, True, "all"])
def test_a_share_outside_of_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match=rf"keep_fraction {share!r} is not a number in \(0, 1\]"):
        build_objective("entropy", keep_fraction=share)


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="rank_scope is 'rank'; set it to one of micro_batch, glo"):
        build_objective("entropy", rank_scope="rank")
