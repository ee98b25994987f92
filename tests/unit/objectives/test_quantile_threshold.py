"""Thresholds that follow from a quantile, against a sorted list of Python floats."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_profit.objectives import (
    OptionSchedule,
    ScheduledObjective,
    TokenStatistics,
    build_objective,
)

SCOPES = ("global_batch", "record", "running")
# Few distinct values, so that there are ties.
PROBS = st.lists(st.sampled_from([0.0, 1e-30, 0.1, 0.2, 0.25, 0.5, 0.9, 1 - 1e-7, 1.0]), min_size=1)
QUANTILES = st.sampled_from([0.0, 0.07, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0])


def profit(direction, quantile, **options):
    return build_objective(
        "profit", threshold_direction=direction, threshold_quantile=quantile, **options
    )


def mask(objective, probs, record=None, dtype=torch.float64):
    log_prob = torch.tensor(probs, dtype=dtype).log()
    extra = {} if record is None else {"record": torch.tensor(record)}
    seen = TokenStatistics(log_prob, **extra)
    output = objective(seen.replaced(**objective.look_ahead(seen)))
    return [bool(weight) for weight in output.weight]


def kept_of(direction, quantile, probs):
    """The definition: of n tokens in order, floor(Qn) fall below `higher` and ceil(Qn) are `lower`;
    at least one is kept, and equal tokens share their fate.
    """
    ranked, n = sorted(probs), len(probs)
    share = Fraction(str(quantile)) * n
    if direction == "higher":
        least = ranked[min(math.floor(share), n - 1)]
        return [p >= least for p in probs]
    most = ranked[max(math.ceil(share), 1) - 1]
    return [p <= most for p in probs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direction", ["higher", "lower"])
@given(probs=PROBS, quantile=QUANTILES)
def test_the_share_of_the_quantile_is_dropped(dtype, direction, probs, quantile):
    # Probabilities that the precision tells apart.
    probs = torch.tensor(probs, dtype=dtype).tolist()
    ours = mask(profit(direction, quantile), probs, dtype=dtype)
    assert ours == kept_of(direction, quantile, probs)


@given(probs=PROBS, low=QUANTILES, high=QUANTILES)
def test_two_quantiles_keep_what_lies_between(probs, low, high):
    low, high = sorted((low, high))
    between = zip(kept_of("higher", low, probs), kept_of("lower", high, probs), strict=True)
    assert mask(profit("middle", (low, high)), probs) == [a and b for a, b in between]


def test_a_fifth_of_a_hundred_tokens_is_dropped():
    probs = torch.rand(100, generator=torch.Generator().manual_seed(0)).double().tolist()
    assert sum(mask(profit("higher", 0.2), probs)) == 80
    assert sum(mask(profit("lower", 0.2), probs)) == 20
    assert sum(mask(profit("middle", (0.2, 0.9)), probs)) == 70


@pytest.mark.parametrize("quantile", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("direction", ["higher", "lower"])
def test_a_single_token_is_kept(direction, quantile):
    for prob in (0.0, 0.3, 1.0):
        assert mask(profit(direction, quantile), [prob]) == [True]


@given(data=st.lists(st.tuples(PROBS, st.integers(0, 9)), max_size=6), quantile=QUANTILES)
def test_each_record_has_a_threshold_of_its_own(data, quantile):
    probs = [p for part, _ in data for p in part]
    record = [number for number, (part, _) in enumerate(data) for _ in part]
    expected = [kept for part, _ in data for kept in kept_of("higher", quantile, part)]
    assert mask(profit("higher", quantile, threshold_scope="record"), probs, record) == expected


def test_rounding_moves_no_token_over_the_threshold():
    """p is computed twice, in the look-ahead and in training, and may be rounded differently."""
    torch.manual_seed(0)
    log_prob = torch.rand(1000).log()
    for direction, quantile in (("higher", 0.3), ("lower", 0.3), ("middle", (0.1, 0.6))):
        objective = profit(direction, quantile)
        bounds = objective.look_ahead(TokenStatistics(log_prob))
        masks = [
            objective(TokenStatistics(log_prob + shift, **bounds)).weight
            for shift in (0, 2e-7 * torch.randn(1000))
        ]
        assert torch.equal(*masks)


def test_the_order_and_the_split_of_the_tokens_do_not_matter():
    torch.manual_seed(0)
    log_prob = torch.rand(60).log()
    objective = profit("higher", 0.35)
    bounds = objective.look_ahead(TokenStatistics(log_prob))
    whole = objective(TokenStatistics(log_prob, **bounds)).weight
    order = torch.randperm(60)
    again = objective.look_ahead(TokenStatistics(log_prob[order]))
    assert torch.equal(again["min_log_prob"], bounds["min_log_prob"])
    halves = [
        objective(TokenStatistics(log_prob[part], min_log_prob=bounds["min_log_prob"][part])).weight
        for part in (slice(0, 23), slice(23, 60))
    ]
    assert torch.equal(torch.cat(halves), whole)


def test_a_look_ahead_of_no_token_is_empty():
    empty = TokenStatistics(torch.empty(0), record=torch.empty(0, dtype=torch.int64))
    for scope in SCOPES:
        found = profit("higher", 0.3, threshold_scope=scope).look_ahead(empty)
        assert [v.shape for v in found.values()] == [(0,)]


def test_a_nan_is_kept_so_that_it_shows():
    assert mask(profit("higher", 0.5), [0.1, math.nan, 0.2]) == [False, True, True]


def test_each_scope_says_what_it_needs():
    for scope in ("global_batch", "record"):
        objective = profit("middle", (0.2, 0.8), threshold_scope=scope)
        assert objective.lookahead == {"min_log_prob": set(), "max_log_prob": set()}
        assert objective.required_statistics == {"min_log_prob", "max_log_prob"}
    running = profit("higher", 0.2, threshold_scope="running")
    assert running.lookahead == {}
    assert running.required_statistics == {"min_log_prob"}
    reference = profit("lower", 0.2, objective_signal="reference")
    assert reference.lookahead == {"max_log_prob": {"ref_log_prob"}}
    assert reference.required_statistics == {"max_log_prob", "ref_log_prob"}
    assert profit("higher", 0.2) == profit("higher", 0.2, threshold_scope="global_batch")


def test_the_quantile_is_of_the_signal():
    log_prob = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    objective = profit("higher", 0.5, objective_signal="reference")
    seen = TokenStatistics(log_prob, ref_log_prob=log_prob.flip(0))
    output = objective(seen.replaced(**objective.look_ahead(seen)))
    assert output.weight.tolist() == [1, 1, 0, 0]
    torch.testing.assert_close(output.loss, -log_prob * output.weight)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prob_threshold": 0.1, "threshold_direction": "higher"}, {"threshold": 0.1}),
        ({"prob_threshold": 0.1, "threshold_direction": "lower"}, {"threshold": 0.1}),
        (
            {"prob_threshold": (0.1, 0.7), "threshold_direction": "middle"},
            {"lower threshold": 0.1, "upper threshold": 0.7},
        ),
        ({"threshold_quantile": 0.2, "threshold_direction": "higher"}, {"threshold": 0.25}),
        (
            {"threshold_quantile": (0.2, 0.8), "threshold_direction": "middle"},
            {"lower threshold": 0.25, "upper threshold": 0.5},
        ),
        ({"keep_fraction": 0.5, "threshold_direction": "random"}, {}),
    ],
)
def test_the_threshold_of_the_step_is_logged(options, expected):
    half = torch.full((3,), 0.5)
    bounds = {"min_log_prob": (half / 2).log(), "max_log_prob": half.log()}
    metrics = build_objective("profit", **options).metrics(TokenStatistics(half.log(), **bounds))
    assert {n: float(total / count) for n, (total, count) in metrics.items()} == pytest.approx(
        expected
    )


def test_gce_takes_a_quantile_too():
    gce = build_objective("gce", threshold_direction="higher", threshold_quantile=0.5)
    assert mask(gce, [0.1, 0.2, 0.3, 0.4]) == [False, False, True, True]
    with pytest.raises(ValueError, match="threshold_direction is None; set it to one of higher"):
        build_objective("gce", threshold_quantile=0.5)
    assert build_objective("gce").metrics(TokenStatistics(torch.zeros(1))) == {}


def test_a_quantile_can_have_a_schedule():
    objective = ScheduledObjective(
        profit("higher", 0.2), (OptionSchedule("threshold_quantile", "linear", 0.0, 10),)
    )
    assert objective.at(5).threshold_quantile == (0.1,)
    assert objective.lookahead == {"min_log_prob": frozenset()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold_quantile": 1.1}, r"threshold_quantile 1\.1 is not a number in \[0, 1\]"),
        ({"threshold_quantile": "a"}, "threshold_quantile 'a' is not a number"),
        ({"threshold_quantile": (0.1, 0.2)}, "holds 2 value"),
        ({"threshold_quantile": 0.1, "prob_threshold": 0.1}, "are two thresholds; remove one"),
        ({"prob_threshold": 0.1, "threshold_scope": "record"}, "threshold_scope='record' says whi"),
        ({"threshold_quantile": 0.1, "threshold_scope": "row"}, "threshold_scope is 'row'; set it"),
        ({}, "prob_threshold is missing .* or set threshold_quantile"),
        (
            {"threshold_direction": "middle", "threshold_quantile": (0.8, 0.2)},
            "threshold_quantile=.* is an empty interval",
        ),
        (
            {"threshold_direction": "random", "threshold_quantile": 0.2},
            "threshold_quantile=0.2 has no meaning for threshold_direction='random'",
        ),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_objective("profit", **{"threshold_direction": "higher", **options})
