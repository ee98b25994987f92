"""The contract of every registered objective, and the registry that builds them."""

import argparse
import copy
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from objective_options import OPTIONS

from megatron_profit.objectives import (
    COMPUTED_STATISTICS,
    Objective,
    ObjectiveOutput,
    RankedObjective,
    TokenStatistics,
    build_objective,
    objective_names,
    objective_options,
    register_objective,
    registry,
)

EVERY_OBJECTIVE = [
    pytest.param(name, options, id=" ".join([name, *map(str, options.values())]))
    for name, cases in OPTIONS.items()
    for options in cases
]


def random_statistics(num_tokens=64, dtype=torch.float64):
    """Every statistic, each on its own: an objective may not rely on how they hang together."""

    def random():
        return torch.rand(num_tokens, dtype=dtype)

    return TokenStatistics(
        random().log().requires_grad_(),
        entropy=6 * random(),
        sum_squared_prob=random(),
        top20_entropy=3 * random(),
        rank=1 + 9 * random(),
        lower_mass=random(),
        ref_log_prob=random().log(),
        ref_lower_mass=random(),
        min_log_prob=2 * random().log(),
        max_log_prob=random().log() / 2,
        median_loss=3 * random(),
        old_log_prob=random().log(),
        uniform=random(),
        selected=random() < 0.5,
    )


def test_every_objective_is_covered_here():
    assert set(OPTIONS) == set(objective_names())


@pytest.mark.parametrize(("name", "options"), EVERY_OBJECTIVE)
def test_weight_is_minus_the_derivative_of_the_loss(name, options):
    torch.manual_seed(0)
    statistics = random_statistics()
    loss, weight = build_objective(name, **options)(statistics)
    (derivative,) = torch.autograd.grad(loss.sum(), statistics.log_prob)
    torch.testing.assert_close(weight, -derivative, rtol=1e-12, atol=1e-14)
    assert not weight.requires_grad


@pytest.mark.parametrize(("name", "options"), EVERY_OBJECTIVE)
def test_a_worse_model_has_the_smaller_loss_only_where_it_is_said(name, options):
    objective = build_objective(name, **options).for_evaluation()

    def loss(p, lower_mass):
        """The loss of a token; the reference gives it 0.3."""
        half, one = torch.full((1,), 0.5, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        seen = TokenStatistics(
            math.log(p) * one,
            entropy=half,
            sum_squared_prob=half,
            top20_entropy=half,
            lower_mass=lower_mass * one,
            ref_log_prob=math.log(0.3) * one,
            ref_lower_mass=one,
            uniform=half,
            selected=one > 0,
            record=one,
        )
        return float(objective(seen.replaced(**objective.look_ahead(seen))).loss)

    is_smaller = loss(0.06, 0.06) < loss(0.3, 0.9)
    if name != "asft":  # whose KL may weigh more than the loss that falls
        assert is_smaller != objective.loss_follows_prob


@pytest.mark.parametrize(("name", "options"), EVERY_OBJECTIVE)
def test_a_token_does_not_depend_on_its_neighbours_unless_it_is_ranked(name, options):
    objective = build_objective(name, **options)
    if isinstance(objective, RankedObjective) and objective.rank_scope == "micro_batch":
        return
    torch.manual_seed(1)
    statistics = random_statistics()
    whole = objective(statistics)
    half = {n: v[32:] for n, v in vars(statistics).items()}
    for one, other in zip(objective(TokenStatistics(**half)), whole, strict=True):
        torch.testing.assert_close(one, other[32:], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), EVERY_OBJECTIVE)
def test_certain_and_impossible_tokens_give_no_nan(name, options):
    """p = 1 and p = 0 under the model, the reference and the old policy, in every combination."""
    edge = torch.tensor([0.0, -1e-7, -1.0, -200.0, -torch.inf])
    log_prob, ref, old = (v.flatten() for v in torch.meshgrid(edge, edge, edge, indexing="ij"))
    half = torch.full_like(log_prob, 0.5)
    statistics = TokenStatistics(
        log_prob,
        entropy=half,
        sum_squared_prob=half,
        top20_entropy=half,
        rank=half + 1,
        lower_mass=half,
        ref_log_prob=ref,
        ref_lower_mass=half,
        min_log_prob=half.log(),
        max_log_prob=half.log(),
        median_loss=half,
        old_log_prob=old,
        uniform=half,
        selected=half > 0,
        softmax_prob=log_prob.exp(),
    )
    objective = build_objective(name, **options)
    loss, weight = objective(statistics)
    assert not loss.isnan().any()
    assert weight.isfinite().all()
    assert (loss[weight == 0] <= 0).all() or name in ("gce", "deft", "asft"), (
        "a dropped token adds 0"
    )
    for total, count in objective.metrics(statistics).values():
        assert not total.isnan()
        assert count == len(log_prob)


@pytest.mark.parametrize(("name", "options"), EVERY_OBJECTIVE)
def test_a_nan_shows(name, options):
    nan, one = torch.tensor([torch.nan]), torch.ones(1)
    computed = dict.fromkeys(COMPUTED_STATISTICS, one)
    external = {"ref_log_prob": nan, "old_log_prob": nan, "uniform": 0 * one, "selected": one > 0}
    external |= {"ref_lower_mass": nan, "min_log_prob": -one, "max_log_prob": -one}
    external["median_loss"] = one
    statistics = TokenStatistics(nan, **computed, **external)
    assert build_objective(name, **options)(statistics).loss.isnan().all()


@pytest.mark.parametrize(("name", "options"), EVERY_OBJECTIVE)
def test_an_objective_that_drops_nothing_says_so(name, options):
    objective = build_objective(name, **options)
    torch.manual_seed(2)
    if not objective.drops_tokens:
        assert (objective(random_statistics()).weight != 0).all()
        assert objective.normalization == "supervised"


@pytest.mark.parametrize(("name", "options"), EVERY_OBJECTIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_output_has_the_shape_and_dtype_of_log_prob(name, options, dtype, num_tokens):
    statistics = random_statistics(num_tokens, dtype)
    for vector in build_objective(name, **options)(statistics):
        assert (vector.shape, vector.dtype) == ((num_tokens,), dtype)


def test_sft_is_cross_entropy():
    logits = torch.randn(9, 5)
    targets = torch.arange(9) % 5
    log_prob = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    output = build_objective("sft")(TokenStatistics(log_prob))
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(output.loss, expected)
    assert output.weight.tolist() == [1.0] * 9


def test_objectives_with_equal_options_are_equal():
    options = {"threshold_direction": "higher"}
    assert build_objective("profit", prob_threshold="0.1", **options) == build_objective(
        "profit", prob_threshold=[0.1], **options
    )


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown objective 'grpo'; choose from .*profit, .*sft"):
        build_objective("grpo")


def test_unknown_option_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="no option tau; its options are objective_signal, prob_threshold"
    ):
        build_objective("profit", tau=0.1)
    with pytest.raises(ValueError, match="'sft' has no option prob_threshold; it takes no options"):
        build_objective("sft", prob_threshold=0.1)


def test_options_make_a_command_line():
    parser = argparse.ArgumentParser()
    for option in objective_options("profit"):
        flag = "--" + option.name.replace("_", "-")
        parser.add_argument(flag, default=option.default, **option.metadata)
    line = "--prob-threshold 0.3 0.7 --threshold-direction middle"
    objective = build_objective("profit", **vars(parser.parse_args(line.split())))
    assert objective.prob_threshold == (0.3, 0.7)
    assert all(option.metadata["help"] for option in objective_options("profit"))


@pytest.fixture
def demanding(monkeypatch):
    """A registered objective that needs two statistics."""
    monkeypatch.setattr(registry, "_OBJECTIVES", dict(registry._OBJECTIVES))

    @register_objective("demanding")
    @dataclass(frozen=True)
    class Demanding(Objective):
        @property
        def required_statistics(self):
            return frozenset({"entropy", "ref_log_prob"})

        def evaluate(self, statistics):
            weight = statistics.entropy * (statistics.log_prob - statistics.ref_log_prob).exp()
            return ObjectiveOutput(weight, weight)

    return Demanding


def test_a_new_objective_is_built_by_name(demanding):
    assert build_objective("demanding") == demanding()
    assert demanding.name == "demanding"
    with pytest.raises(ValueError, match=r"'demanding' is already registered by .*Demanding"):
        register_objective("demanding")(demanding)


def test_a_missing_statistic_is_named(demanding):
    log_prob = torch.zeros(3)
    with pytest.raises(ValueError, match="Demanding needs the statistic entropy, ref_log_prob"):
        demanding()(TokenStatistics(log_prob))
    with pytest.raises(ValueError, match=r"the statistic ref_log_prob; pass TokenStatistics\(ref"):
        demanding()(TokenStatistics(log_prob, entropy=log_prob))
    demanding()(TokenStatistics(log_prob, entropy=log_prob, ref_log_prob=log_prob))


def test_statistics_refuse_half_precision_and_other_shapes():
    with pytest.raises(ValueError, match=r"log_prob is torch\.bfloat16; .*float32 or float64"):
        TokenStatistics(torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"entropy has shape \(2,\), log_prob has \(3,\)"):
        TokenStatistics(torch.zeros(3), entropy=torch.zeros(2))
    ranking = build_objective("entropy", rank_scope="global_batch")
    with pytest.raises(ValueError, match=r"selected is torch\.float32; pass a mask of torch\.bool"):
        ranking(TokenStatistics(torch.zeros(3), selected=torch.zeros(3)))


def test_external_statistics_have_any_name_that_is_free():
    log_prob, margin = torch.zeros(3), torch.ones(3)
    statistics = TokenStatistics(log_prob, entropy=log_prob, margin=margin, unknown=None)
    assert statistics.margin is margin
    assert statistics.external == {"margin": margin}
    assert vars(statistics) == {"log_prob": log_prob, "entropy": log_prob, "margin": margin}
    assert statistics.sum_squared_prob is None
    with pytest.raises(
        AttributeError, match=r"no statistic unknown is known; pass TokenStatistics\(u"
    ):
        _ = statistics.unknown
    with pytest.raises(
        AttributeError, match=r"margin cannot be set; see TokenStatistics\.replaced"
    ):
        statistics.margin = log_prob
    other = statistics.replaced(margin=log_prob, width=margin)
    assert other.external == {"margin": log_prob, "width": margin}
    for name in ("prob", "external", "replaced", "no name"):
        with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
            TokenStatistics(log_prob, **{name: margin})


def test_statistics_can_be_copied_and_stored():
    statistics = TokenStatistics(torch.zeros(3), margin=torch.ones(3))
    for copied in (copy.deepcopy(statistics), pickle.loads(pickle.dumps(statistics))):
        assert vars(copied).keys() == {"log_prob", "margin"}
        assert copied.margin.tolist() == [1, 1, 1]


@pytest.mark.parametrize(("name", "options"), EVERY_OBJECTIVE)
def test_an_objective_without_a_schedule_is_the_same_at_every_step(name, options):
    objective = build_objective(name, **options)
    assert objective.at(0) is objective.at(10**6) is objective.final is objective
    evaluated = objective.for_evaluation()
    assert evaluated is objective if name != "psft" else evaluated.name == "sft"
    assert "old_log_prob" not in evaluated.needed_statistics
    assert objective.needed_statistics >= objective.required_statistics
    quantile = "threshold_quantile" in options and options.get("threshold_scope") != "running"
    ranked = options.get("rank_scope") == "global_batch"
    assert (objective.lookahead != {}) == (quantile or ranked or name == "talr")


def test_prob_is_the_softmax_where_it_is_known():
    log_prob = torch.tensor([0.25, 0.5]).log()
    torch.testing.assert_close(TokenStatistics(log_prob).prob, torch.tensor([0.25, 0.5]))
    known = torch.tensor([0.1, 0.2])
    assert TokenStatistics(log_prob, softmax_prob=known).prob is known
