"""ProFit: which tokens are kept, at the threshold and beside it; every refused option."""

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from megatron_profit.objectives import TokenStatistics, build_objective, token_uniform

COMMON_TAUS = [i / 20 for i in range(1, 20)] + [0.01, 0.001, 1 / 3, 1 / 7]


def kept(direction, threshold, probs, dtype=torch.float64):
    objective = build_objective("profit", threshold_direction=direction, prob_threshold=threshold)
    statistics = TokenStatistics(torch.tensor(probs, dtype=dtype).log())
    return objective(statistics).weight.bool().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions(dtype):
    probs = [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0]
    assert kept("higher", 0.1, probs, dtype) == [False, False, True, True, True, True, True]
    assert kept("lower", 0.3, probs, dtype) == [True, True, True, True, True, False, False]
    assert kept("middle", (0.1, 0.3), probs, dtype) == [
        False,
        False,
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", COMMON_TAUS)
def test_a_probability_equal_to_the_threshold_is_kept(tau, dtype):
    """Though exp(log(0.1)) is not 0.1 in float32."""
    for direction, threshold in (("higher", tau), ("lower", tau), ("middle", (tau, tau))):
        assert kept(direction, threshold, [tau], dtype) == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [2, 3, 5, 7, 10, 14, 20, 100])
def test_a_softmax_equal_to_the_threshold_is_kept(vocab_size, dtype):
    """Equal logits make p exactly 1/V; the softmax shows it where its logarithm does not."""
    logits = torch.zeros(1, vocab_size, dtype=dtype)
    statistics = TokenStatistics(
        logits.log_softmax(-1)[:, 0], softmax_prob=logits.softmax(-1)[:, 0]
    )
    for direction in ("higher", "lower"):
        objective = build_objective(
            "profit", threshold_direction=direction, prob_threshold=1 / vocab_size
        )
        assert objective(statistics).weight.item() == 1


@settings(max_examples=300)
@given(tau=st.floats(0, 1), double=st.booleans())
@example(tau=0.0, double=False)
@example(tau=1.0, double=False)
@example(tau=5e-324, double=True)
def test_any_probability_that_equals_its_threshold_is_kept(tau, double):
    dtype = torch.float64 if double else torch.float32
    for direction, threshold in (("higher", tau), ("lower", tau), ("middle", (tau, tau))):
        assert kept(direction, threshold, [tau], dtype) == [True]


@settings(max_examples=100)
@given(tau=st.floats(0, 1), probs=st.lists(st.floats(0, 1), max_size=9))
def test_an_interval_of_one_point_keeps_what_both_its_sides_keep(tau, probs):
    above, below = kept("higher", tau, probs), kept("lower", tau, probs)
    middle = [one and other for one, other in zip(above, below, strict=True)]
    assert kept("middle", (tau, tau), probs) == middle
    assert all(one or other for one, other in zip(above, below, strict=True)), "none is lost"


@settings(max_examples=200)
@given(log_prob=st.floats(-20, 0, width=32), double=st.booleans())
def test_the_neighbours_of_a_threshold_fall_on_their_sides(log_prob, double):
    dtype = torch.float64 if double else torch.float32
    p = torch.tensor(log_prob, dtype=dtype).exp()
    below, above = p * (1 - 1e-5), p * (1 + 1e-5)
    probs = [below.item(), p.item(), above.item()]
    assert kept("higher", p.item(), probs, dtype) == [False, True, True]
    assert kept("lower", p.item(), probs, dtype) == [True, True, False]
    assert kept("middle", (p.item(), p.item()), probs, dtype) == [False, True, False]


@settings(max_examples=200)
@given(tau=st.floats(0, 1), other=st.floats(0, 1), p=st.floats(0, 1))
def test_masks_follow_the_comparison(tau, other, p):
    # Rounding decides about what is that close and not equal.
    assume(p == tau or not math.isclose(p, tau, rel_tol=1e-12))
    assert kept("higher", tau, [p]) == [p >= tau]
    assert kept("lower", tau, [p]) == [p <= tau]
    low, high = sorted((tau, other))
    both = kept("higher", low, [p])[0] and kept("lower", high, [p])[0]
    assert kept("middle", (low, high), [p]) == [both]


def test_the_ends_of_the_scale():
    probs = [0.0, 1e-30, 0.5, 1.0]
    assert kept("higher", 0, probs) == [True] * 4
    assert kept("lower", 1, probs) == [True] * 4
    assert kept("middle", (0, 1), probs) == [True] * 4
    assert kept("higher", 1, probs) == [False, False, False, True]
    assert kept("lower", 0, probs) == [True, False, False, False]


def test_loss_of_a_dropped_token_is_zero_even_at_probability_zero():
    log_prob = torch.tensor([-math.inf, -1.0], requires_grad=True)
    objective = build_objective("profit", threshold_direction="higher", prob_threshold=0.1)
    loss = objective(TokenStatistics(log_prob)).loss
    assert loss.tolist() == [0.0, 1.0]
    loss.sum().backward()
    assert log_prob.grad.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("direction", ["higher", "lower"])
def test_nan_is_kept_and_shows(direction):
    objective = build_objective("profit", threshold_direction=direction, prob_threshold=0.1)
    output = objective(TokenStatistics(torch.tensor([math.nan])))
    assert output.loss.isnan().item()
    assert output.weight.item() == 1


def test_random_keeps_the_share_that_its_name_says():
    objective = build_objective("profit", threshold_direction="random", keep_fraction=0.7)
    uniform = torch.tensor([0.0, 0.3, 0.6999, 0.7, 0.71, 0.99])
    output = objective(TokenStatistics(torch.full((6,), -1.0), uniform=uniform))
    assert output.weight.tolist() == [1, 1, 1, 0, 0, 0]
    assert objective.required_statistics == {"uniform"}


def test_random_draws_for_itself_when_no_numbers_are_given():
    objective = build_objective("profit", threshold_direction="random", keep_fraction=0.7)
    statistics = TokenStatistics(torch.full((20_000,), -1.0))
    torch.manual_seed(1)
    weight = objective(statistics).weight
    assert abs(weight.mean().item() - 0.7) < 0.02
    assert not torch.equal(weight, objective(statistics).weight)
    torch.manual_seed(1)
    assert torch.equal(weight, objective(statistics).weight)


@settings(max_examples=50)
@given(ratio=st.floats(0, 1), seed=st.integers(0, 2**31), ranks=st.integers(1, 7))
def test_random_keeps_its_ratio_for_any_seed_and_the_same_tokens_for_any_layout(ratio, seed, ranks):
    sample, position = (x.flatten() for x in torch.meshgrid(*[torch.arange(64)] * 2, indexing="ij"))
    objective = build_objective("profit", threshold_direction="random", keep_fraction=ratio)

    def weights(tokens):
        uniform = token_uniform(seed, sample[tokens], position[tokens])
        return objective(TokenStatistics(torch.zeros(len(tokens)), uniform=uniform)).weight

    whole = weights(torch.arange(64 * 64))
    assert abs(whole.mean().item() - ratio) < 5 * (ratio * (1 - ratio) / len(whole)) ** 0.5 + 1e-3
    torch.manual_seed(seed)
    parts = torch.randperm(len(whole)).tensor_split(ranks)
    assert all(torch.equal(weights(part), whole[part]) for part in parts)


@pytest.mark.parametrize(("ratio", "share"), [(0, 0.0), (1, 1.0)])
def test_random_at_its_ends(ratio, share):
    objective = build_objective("profit", threshold_direction="random", keep_fraction=ratio)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-24])
    assert objective(TokenStatistics(torch.zeros(3), uniform=uniform)).weight.mean() == share


@pytest.mark.parametrize(
    ("given_value", "parsed"),
    [
        (0.1, (0.1,)),
        (1, (1.0,)),
        ("0.1", (0.1,)),
        ([0.1], (0.1,)),
        (["0.1"], (0.1,)),
        ("1e-2", (0.01,)),
        ("0.3 0.7", (0.3, 0.7)),
        ("0.3,0.7", (0.3, 0.7)),
        ("0.3, 0.7", (0.3, 0.7)),
        (["0.3,0.7"], (0.3, 0.7)),
        (("0.3", 0.7), (0.3, 0.7)),
        ([0.3, 0.3], (0.3, 0.3)),
    ],
)
def test_thresholds_are_parsed(given_value, parsed):
    direction = "middle" if len(parsed) == 2 else "higher"
    objective = build_objective("profit", prob_threshold=given_value, threshold_direction=direction)
    assert objective.prob_threshold == parsed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "threshold_direction is None; set it to one of higher, lower, middle, random"),
        ({"prob_threshold": 0.1}, "threshold_direction is None"),
        (
            {"prob_threshold": 0.1, "threshold_direction": "above"},
            "threshold_direction is 'above'; set it to one of higher",
        ),
        ({"threshold_direction": "higher"}, "prob_threshold is missing.*'higher'"),
        ({"threshold_direction": "middle"}, "prob_threshold is missing.*'middle'"),
        ({"threshold_direction": "higher", "prob_threshold": []}, r"holds 0 value\(s\).*takes 1"),
        ({"threshold_direction": "higher", "prob_threshold": ""}, r"holds 0 value\(s\)"),
        ({"threshold_direction": "higher", "prob_threshold": 1.5}, r"1\.5 is not a .* \[0, 1\]"),
        ({"threshold_direction": "higher", "prob_threshold": -0.1}, r"-0\.1 is not a number"),
        ({"threshold_direction": "higher", "prob_threshold": math.nan}, "nan is not a number"),
        ({"threshold_direction": "higher", "prob_threshold": "nan"}, "'nan' is not a number"),
        ({"threshold_direction": "higher", "prob_threshold": "inf"}, "'inf' is not a number"),
        ({"threshold_direction": "higher", "prob_threshold": "ten"}, "'ten' is not a number"),
        ({"threshold_direction": "higher", "prob_threshold": True}, "True is not a number"),
        ({"threshold_direction": "higher", "prob_threshold": {}}, "{} is not a number"),
        (
            {"threshold_direction": "higher", "prob_threshold": "0.3,0.7"},
            r"'0.3,0.7' holds 2 value\(s\); threshold_direction='higher' takes 1",
        ),
        (
            {"threshold_direction": "lower", "prob_threshold": [0.3, 0.7]},
            "threshold_direction='lower' takes 1",
        ),
        (
            {"threshold_direction": "middle", "prob_threshold": 0.3},
            r"0.3 holds 1 value\(s\); threshold_direction='middle' takes 2",
        ),
        (
            {"threshold_direction": "middle", "prob_threshold": [0.7, 0.3]},
            "empty interval; give the lower threshold first",
        ),
        (
            {"threshold_direction": "random", "prob_threshold": 0.3},
            "prob_threshold=0.3 has no meaning.*set keep_fraction",
        ),
        ({"threshold_direction": "random"}, "keep_fraction is missing"),
        ({"threshold_direction": "random", "keep_fraction": 1.1}, r"keep_fraction 1\.1 is not"),
        ({"threshold_direction": "random", "keep_fraction": "most"}, "keep_fraction 'most' is not"),
        (
            {"threshold_direction": "higher", "prob_threshold": 0.1, "keep_fraction": 0.5},
            "keep_fraction=0.5 is only for threshold_direction='random', not 'higher'",
        ),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_objective("profit", **options)
