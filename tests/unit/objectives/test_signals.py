"""The same rule on the probabilities of the model in training, and on those of a frozen reference."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_options import OPTIONS

from megatron_profit.objectives import (
    ScheduledObjective,
    SignalObjective,
    TokenStatistics,
    build_objective,
)

LOG_PROBS = st.floats(-60, -1e-6)
# The weight of a token by its probability, as the papers write it.
WEIGHTS = {
    "dft": lambda p: p,
    "chord-phi": lambda p: p * (1 - p),
    "gce": lambda p: p,
    "deft": lambda p: p**0.3,
    "infosft": lambda p: p * max(0, 1 - math.log(p / (1 - p)) / math.log(0.93 / 0.07)),
    "talr": lambda p: max(p ** (1 / 1.7), 0.01),
}
OTHERS = {"sum_squared_prob": 0.3, "median_loss": 1.7}


def tokens(log_prob, **statistics):
    vectors = {n: torch.tensor([v], dtype=torch.float64) for n, v in statistics.items()}
    return TokenStatistics(torch.tensor([log_prob], dtype=torch.float64), **vectors)


@pytest.mark.parametrize("name", WEIGHTS)
@given(log_prob=LOG_PROBS, ref=LOG_PROBS)
def test_the_reference_takes_the_place_of_the_model_in_the_weight_alone(name, log_prob, ref):
    objective = build_objective(name, objective_signal="reference")
    loss, weight = objective(tokens(log_prob, ref_log_prob=ref, **OTHERS))
    expected = WEIGHTS[name](math.exp(ref))
    assert weight.item() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert loss.item() == pytest.approx(-expected * log_prob, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("name", WEIGHTS)
@given(log_prob=LOG_PROBS)
def test_the_weight_of_the_model_itself_is_the_formula(name, log_prob):
    output = build_objective(name)(tokens(log_prob, **OTHERS))
    assert output.weight.item() == pytest.approx(
        WEIGHTS[name](math.exp(log_prob)), rel=1e-6, abs=1e-12
    )


def test_every_objective_of_p_has_the_option():
    named = {*WEIGHTS, "profit", "prift-prob", "prift-mass"}
    have = {n for n, cases in OPTIONS.items() for c in cases if "objective_signal" in c}
    assert have <= named
    for name in named:
        assert isinstance(build_objective(name, **OPTIONS[name][0]), SignalObjective)


def random_tokens(count=200):
    torch.manual_seed(0)
    log_prob, ref = torch.rand(2, count, dtype=torch.float64).log()
    return TokenStatistics(log_prob, ref_log_prob=ref, softmax_prob=log_prob.exp())


def test_profit_on_the_reference_is_stm():
    statistics = random_tokens()
    profit = build_objective(
        "profit",
        prob_threshold=0.4,
        threshold_direction="higher",
        objective_signal="reference",
    )
    assert profit.required_statistics == {"ref_log_prob"}
    for ours, stm in zip(profit(statistics), build_objective("stm")(statistics), strict=True):
        assert torch.equal(ours, stm)


def test_prift_prob_is_dft_on_the_reference():
    statistics = random_tokens()
    prift = build_objective("prift-prob")
    assert prift.needs_reference
    dft = build_objective("dft", objective_signal="reference")
    assert torch.equal(prift(statistics).weight, statistics.ref_log_prob.exp())
    for one, other in zip(prift(statistics), dft(statistics), strict=True):
        assert torch.equal(one, other)
    assert not build_objective("prift-prob", objective_signal="current").needs_reference


@pytest.mark.parametrize("signal", ["current", "reference"])
def test_prift_mass_keeps_targets_with_half_of_the_mass_at_or_below_them(signal):
    torch.manual_seed(0)
    probs = (3 * torch.randn(300, 7, dtype=torch.float64)).softmax(-1)
    target = torch.arange(300) % 7
    own = probs.gather(1, target[:, None])
    mass = [
        sum(q for q in row if q <= row[t]) for row, t in zip(probs.tolist(), target, strict=True)
    ]
    name = "lower_mass" if signal == "current" else "ref_lower_mass"
    log_prob = torch.rand(300, dtype=torch.float64).log()
    objective = build_objective("prift-mass", objective_signal=signal)
    assert objective.required_statistics == {name}
    given_mass = torch.tensor(mass, dtype=torch.float64)
    loss, weight = objective(TokenStatistics(log_prob, **{name: given_mass}))
    assert weight.tolist() == [float(u >= 0.5) for u in mass]
    assert torch.equal(loss, -log_prob * weight)
    assert 0 < weight.mean() < 1
    assert (given_mass >= own[:, 0]).all()


def test_a_mass_at_the_threshold_is_kept():
    half = torch.tensor([0.5, 0.4999])
    output = build_objective("prift-mass")(TokenStatistics(half.log(), ref_lower_mass=half))
    assert output.weight.tolist() == [1, 0]


def test_a_random_choice_has_no_signal():
    options = {"threshold_direction": "random", "keep_fraction": 0.5}
    with pytest.raises(ValueError, match="objective_signal='reference' has no meaning for thres"):
        build_objective("profit", **options, objective_signal="reference")
    build_objective("gce", **options, objective_signal="reference")


def test_an_unknown_signal_is_refused():
    for name, options in (("dft", {}), ("gce", {}), ("profit", {"prob_threshold": 0.1})):
        with pytest.raises(ValueError, match="objective_signal is 'base'; set it to one of curr"):
            build_objective(name, objective_signal="base", **options)


@pytest.mark.parametrize("known", [0.5, 1, 0.2, math.nan])
def test_a_logit_that_divides_by_0_is_refused(known):
    with pytest.raises(ValueError, match=r"known_prob (is|0|n)"):
        build_objective("infosft", known_prob=known)


def test_a_schedule_needs_the_reference_of_its_end():
    objective = build_objective("dft", objective_signal="reference")
    assert ScheduledObjective(objective, warmup_steps=3).needs_reference
    assert not ScheduledObjective(objective, warmup_steps=3).at(0).needs_reference


def test_talr_takes_the_median_over_the_records():
    """Three records, of 2, 1 and 3 tokens, with the mean losses 2, 5 and 3; then without the last."""
    loss = torch.tensor([1.0, 3.0, 5.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    record = torch.tensor([4, 4, 7, 9, 9, 9])
    talr = build_objective("talr")
    for count, median in ((6, 3.0), (3, 3.5), (2, 2.0), (0, None)):
        seen = TokenStatistics(-loss[:count], record=record[:count])
        decided = talr.look_ahead(seen)["median_loss"]
        assert decided.tolist() == [median] * count
    output = talr(TokenStatistics(torch.zeros(1), median_loss=torch.zeros(1)))
    assert output.weight.item() == 1, "a batch of certain tokens"
