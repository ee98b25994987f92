"""Means over the tokens of a step, and quantiles of p, however the tokens are split."""

from __future__ import annotations

import pytest
import torch

from megatron_profit.objectives import TokenStatistics, build_objective
from megatron_profit.ops.statistics import LinearObjectiveStatistics
from megatron_profit.training.step.token_metrics import ProbQuantiles, token_sums

LEVELS = (0.01, 0.1, 0.5, 0.9)
LOWEST = float(torch.tensor(-ProbQuantiles.LIMIT).double().sigmoid())


def window(log_prob: torch.Tensor, parts: int) -> dict[str, float]:
    """The values of one window of `parts` micro-batches."""
    quantiles = ProbQuantiles(LEVELS)
    total = torch.zeros(len(LEVELS), 2)
    for part in log_prob.tensor_split(parts):
        report = quantiles.add(part, parts, None)
        total += torch.stack(list(report.values()))
    assert list(report) == ["p quantile 0.01", "p quantile 0.1", "p quantile 0.5", "p quantile 0.9"]
    return (total[:, 0] / total[:, 1]).tolist()


@pytest.mark.parametrize("sharpness", [0.3, 3.0, 8.0])
def test_they_are_those_of_all_tokens_for_any_split(sharpness):
    torch.manual_seed(0)
    log_odds = sharpness * torch.randn(20_000, dtype=torch.float64)
    prob = log_odds.sigmoid()
    exact = prob.quantile(torch.tensor(LEVELS, dtype=torch.float64)).clamp(LOWEST, 1 - LOWEST)
    whole = window(prob.log().float(), 1)
    assert whole == window(prob.log().float(), 7)
    odds = torch.tensor(whole, dtype=torch.float64).logit().exp()
    torch.testing.assert_close(odds, exact.logit().exp(), rtol=2e-2, atol=0)


def test_certain_impossible_and_missing_tokens():
    extremes = torch.tensor([0.0, -torch.inf, torch.nan, -200.0])
    low, *_, high = window(extremes, 2)
    assert low == pytest.approx(1e-7, abs=1e-7)
    assert high == pytest.approx(1, abs=1e-6)
    assert window(torch.zeros(0), 3) == [0.0] * 4


def test_a_new_window_begins_with_no_tokens():
    quantiles = ProbQuantiles((0.5,))
    for prob in (0.2, 0.7):
        value, count = quantiles.add(torch.tensor([prob]).log(), 1, None)["p quantile 0.5"].tolist()
        assert (value, count) == (pytest.approx(prob, rel=1e-2), 1)


@pytest.mark.parametrize(
    ("levels", "named"), [((0.0,), "0.0"), ((1.5,), "1.5"), ((0.5, 0.5), "twice")]
)
def test_what_is_no_quantile_is_refused(levels, named):
    with pytest.raises(ValueError, match=named):
        ProbQuantiles(levels)


@pytest.mark.parametrize(
    ("name", "is_known"),
    [("stm", True), pytest.param("profit", True, id="log-reference"), ("profit", False)],
)
def test_where_the_reference_is_known_its_probabilities_are_told(name, is_known):
    p, q = torch.tensor([0.5, 0.25, 0.125, 0.75]), torch.tensor([0.9, 0.5, 0.1, 0.2])
    options = {"threshold_direction": "higher", "prob_threshold": 0.2} if name == "profit" else {}
    objective = build_objective(name, **options)
    tokens = TokenStatistics(log_prob=p.log(), ref_log_prob=q.log() if is_known else None)
    sums = token_sums(
        LinearObjectiveStatistics(tokens, objective(tokens).weight, torch.arange(4)), objective
    )
    means = {key: float(total / count) for key, (total, count) in sums.items()}
    if is_known:
        assert means["mean q"] == pytest.approx(0.425)
        kept = {"stm": 0.7, "profit": (0.9 + 0.5 + 0.2) / 3}[name]
        assert means["mean q kept"] == pytest.approx(kept), "stm keeps q above 0.4, profit p"
    else:
        assert means.keys().isdisjoint({"mean q", "mean q kept"})
    assert means["mean p kept"] == pytest.approx({"stm": 0.375, "profit": 0.5}[name])
