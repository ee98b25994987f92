"""Proximal SFT against the surrogate as the paper writes it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_profit.objectives import TokenStatistics, build_objective

LOG_PROBS = st.floats(-60, 0)


def statistics(log_prob, old_log_prob, dtype=torch.float64):
    log_prob = torch.tensor(log_prob, dtype=dtype).requires_grad_()
    old = torch.tensor(old_log_prob, dtype=dtype)
    return TokenStatistics(log_prob, old_log_prob=old, entropy=old)


@given(st.lists(st.tuples(LOG_PROBS, LOG_PROBS), min_size=1), st.floats(0, 1), st.floats(0, 3))
def test_loss_and_weight_are_those_of_the_clipped_surrogate(pairs, low, high):
    tokens = statistics(*map(list, zip(*pairs, strict=True)))
    loss, weight = build_objective("psft", clip_low=low, clip_high=high)(tokens)
    for (log_prob, old), one_loss, one_weight in zip(pairs, loss, weight, strict=True):
        ratio = math.exp(max(-20.0, min(20.0, log_prob - old)))
        clipped = max(1 - low, min(1 + high, ratio))
        assert one_loss.item() == pytest.approx(-min(ratio, clipped), rel=1e-12)
        if abs(ratio - (1 + high)) > 1e-12 and abs(log_prob - old + 20) > 1e-9:
            trained = ratio < 1 + high and log_prob - old > -20
            assert one_weight.item() == pytest.approx(ratio * trained, rel=1e-12)
    (slope,) = torch.autograd.grad(loss.sum(), tokens.log_prob)
    torch.testing.assert_close(weight, -slope, rtol=0, atol=0)


def test_at_the_old_policy_it_is_sft():
    _, weight = build_objective("psft")(statistics([-3.0, -0.1, 0.0], [-3.0, -0.1, 0.0]))
    assert weight.tolist() == [1.0] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_zero_and_nan(dtype):
    inf, nan = math.inf, math.nan
    tokens = statistics([-inf, -inf, -1.0, nan, -1.0], [-inf, -1.0, -inf, -1.0, nan], dtype)
    loss, weight = build_objective("psft")(tokens)
    assert loss[:3].tolist() == pytest.approx([-1.0, -math.exp(-20), -1.28])
    assert weight[:3].tolist() == [1.0, 0.0, 0.0]
    assert loss[3:].isnan().all(), "a NaN shows"
    assert weight[3:].isnan().all()


def test_metrics_are_sums_over_the_tokens():
    ratios = torch.tensor([0.5, 1.0, 1.2, 1.3], dtype=torch.float64)
    old = torch.full_like(ratios, -2.0)
    tokens = TokenStatistics(old + ratios.log(), old_log_prob=old)
    found = {
        name: (total.item(), count.item())
        for name, (total, count) in build_objective("psft").metrics(tokens).items()
    }
    assert found == {
        "clip fraction": (1, 4),
        "ratio below clip": (1, 4),
        "mean ratio": (pytest.approx(4.0), 4),
        "approximate KL": (pytest.approx(float((ratios - 1 - ratios.log()).sum())), 4),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_low": 1.5}, r"clip_low 1\.5 is not a number in \[0, 1\]"),
        ({"clip_high": -0.1}, r"clip_high -0\.1 is not a number in \[0, inf\)"),
        ({"clip_high": math.inf}, "clip_high inf is not a number"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_objective("psft", **options)
