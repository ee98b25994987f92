"""Each objective against its formula as the paper writes it, in Python floats or on dense logits."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_profit.objectives import TokenStatistics, build_objective
from megatron_profit.objectives.numerics import log1mexp

PROBS = st.floats(1e-30, 1 - 1e-9)
SHARES = st.floats(0, 1)


def evaluate(name, log_prob, statistics=None, **options):
    """(loss, weight) of one token in float64."""

    def tensor(value):
        return torch.tensor([value], dtype=torch.float64)

    given = {key: tensor(value) for key, value in (statistics or {}).items()}
    output = build_objective(name, **options)(TokenStatistics(tensor(log_prob), **given))
    return output.loss.item(), output.weight.item()


@given(p=PROBS)
def test_dft(p):
    loss, weight = evaluate("dft", math.log(p))
    assert loss == pytest.approx(-p * math.log(p), rel=1e-9)
    assert weight == pytest.approx(p, rel=1e-9)


@given(p=PROBS, q=st.floats(1e-2, 20))
def test_gce(p, q):
    loss, weight = evaluate("gce", math.log(p), prob_exponent=q)
    assert loss == pytest.approx((1 - p**q) / q, rel=1e-6, abs=1e-12)
    assert weight == pytest.approx(p**q, rel=1e-6, abs=1e-300)


def test_gce_lies_between_sft_and_minus_p():
    assert evaluate("gce", -3.0, prob_exponent=1e-9)[0] == pytest.approx(3.0, rel=1e-6)
    assert evaluate("gce", -3.0)[0] == pytest.approx(1 - math.exp(-3))
    assert evaluate("gce", -3.0)[1] == pytest.approx(evaluate("dft", -3.0)[1])


@given(p=PROBS, tau=SHARES)
def test_gce_with_a_threshold(p, tau):
    above = evaluate("gce", math.log(p), threshold_direction="higher", prob_threshold=tau)
    below = evaluate("gce", math.log(p), threshold_direction="lower", prob_threshold=tau)
    whole = evaluate("gce", math.log(p))
    if abs(p - tau) > 1e-12 * p:
        assert above == (whole if p > tau else (0, 0))
        assert below == (whole if p < tau else (0, 0))


@given(p=PROBS, entropy=st.floats(-1e-7, math.log(20)), alpha=st.floats(0.1, 3))
def test_eaft(p, entropy, alpha):
    loss, weight = evaluate("eaft", math.log(p), {"top20_entropy": entropy}, entropy_exponent=alpha)
    expected = (max(entropy, 0) / 3) ** alpha
    assert weight == pytest.approx(expected)
    assert loss == pytest.approx(-expected * math.log(p))


@given(p=PROBS, certainty=st.floats(1e-6, 1))
def test_deft(p, certainty):
    loss, weight = evaluate("deft", math.log(p), {"sum_squared_prob": certainty})
    assert weight == pytest.approx(p**certainty)
    assert loss == pytest.approx((1 - p**certainty) / certainty, rel=1e-6, abs=1e-8)


@given(p=PROBS)
def test_chord_phi(p):
    loss, weight = evaluate("chord-phi", math.log(p))
    assert weight == pytest.approx(p * (1 - p), rel=1e-6)
    assert loss == pytest.approx(-p * (1 - p) * math.log(p), rel=1e-6)


@given(p=PROBS, ref=PROBS, low=SHARES, high=st.floats(1, 9))
def test_iw_sft(p, ref, low, high):
    loss, weight = evaluate(
        "iw-sft", math.log(p), {"ref_log_prob": math.log(ref)}, ratio_min=low, ratio_max=high
    )
    assert weight == pytest.approx(max(low, min(high, p / ref)), rel=1e-9)
    assert loss == pytest.approx(-weight * math.log(p), rel=1e-9)


@given(p=PROBS, ref=SHARES, strength=st.floats(0, 5))
def test_asft(p, ref, strength):
    assume(ref == 0 or ref > 1e-30)
    ref_log_prob = math.log(ref) if ref else -math.inf
    loss, weight = evaluate("asft", math.log(p), {"ref_log_prob": ref_log_prob}, kl_weight=strength)
    kl = (ref * math.log(ref / p) if ref else 0) + (
        (1 - ref) * math.log((1 - ref) / (1 - p)) if ref < 1 else 0
    )
    assert loss == pytest.approx(-p * math.log(p) + strength * kl, rel=1e-5, abs=1e-8)
    assert weight == pytest.approx(p + strength * (ref - p) / (1 - p), rel=1e-5, abs=1e-6)


def test_the_anchor_of_asft_is_that_of_the_full_kl_on_the_target():
    torch.manual_seed(0)
    logits, ref_logits = torch.randn(2, 50, 7, dtype=torch.float64) * 3
    logits.requires_grad_()
    targets = torch.arange(50) % 7
    log_probs, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)

    def take(matrix):
        return matrix.gather(1, targets[:, None])[:, 0]

    full = torch.nn.functional.kl_div(log_probs, ref, log_target=True, reduction="none").sum(-1)
    (full_grad,) = torch.autograd.grad(full.sum(), logits, retain_graph=True)
    statistics = TokenStatistics(take(log_probs), ref_log_prob=take(ref))
    with_anchor, without = (
        build_objective("asft", kl_weight=weight)(statistics).loss for weight in (1.0, 0.0)
    )
    anchor = with_anchor - without
    (grad,) = torch.autograd.grad(anchor.sum(), logits)
    torch.testing.assert_close(take(grad), take(full_grad))
    assert (anchor <= full + 1e-12).all(), "data processing"


def test_asft_without_an_anchor_is_dft():
    token = {"ref_log_prob": -1.0}
    assert evaluate("asft", -0.3, token, kl_weight=0) == evaluate("dft", -0.3)


@given(ref=st.floats(-60, 0), tau=SHARES)
def test_stm(ref, tau):
    loss, weight = evaluate("stm", -2.5, {"ref_log_prob": ref}, ref_prob_threshold=tau)
    if abs(math.exp(ref) - tau) > 1e-12 * tau:
        assert weight == (math.exp(ref) > tau)
    assert loss == 2.5 * weight


@given(tau=st.floats(1e-30, 1, exclude_min=True))
def test_a_reference_at_the_threshold_is_kept(tau):
    assert evaluate("stm", -1.0, {"ref_log_prob": math.log(tau)}, ref_prob_threshold=tau)[1] == 1


def test_rho1_trains_what_the_reference_finds_easier():
    log_prob = torch.tensor([-1.0, -5.0, -4.0, -torch.inf, -0.1])
    ref = torch.tensor([-0.5, -5.0, -1.0, -torch.inf, -3.0])
    output = build_objective("rho1", keep_fraction=0.4)(TokenStatistics(log_prob, ref_log_prob=ref))
    assert output.weight.tolist() == [1.0, 0.0, 1.0, 0.0, 0.0]


@given(st.floats(-700, -1e-15))
def test_log1mexp(log_prob):
    expected = (
        math.log(-math.expm1(log_prob)) if log_prob > -0.69 else math.log1p(-math.exp(log_prob))
    )
    found = log1mexp(torch.tensor(log_prob, dtype=torch.float64)).item()
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gce", {"prob_exponent": 0}, r"prob_exponent 0 is not a number in \(0, inf\)"),
        ("gce", {"prob_threshold": 0.1}, "threshold_direction is None; set it to one of higher"),
        ("gce", {"keep_fraction": 0.1}, "threshold_direction is None"),
        ("eaft", {"entropy_exponent": -1}, "entropy_exponent -1 is not a number"),
        ("iw-sft", {"ratio_min": 1.1}, r"ratio_min 1\.1 is not a number in \[0, 1\]"),
        ("iw-sft", {"ratio_max": 0.9}, r"ratio_max 0\.9 is not a number in \[1, inf\)"),
        ("asft", {"kl_weight": -0.1}, "kl_weight -0.1 is not a number"),
        ("stm", {"ref_prob_threshold": 2}, "ref_prob_threshold 2 is not a number"),
        ("rho1", {"keep_fraction": 0}, "keep_fraction 0 is not a number"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_objective(name, **options)
