"""Estimates against brute force and closed forms."""

import itertools
import math

import numpy as np
import pytest

from megatron_profit.evaluation.estimators import (
    average_at_k,
    bootstrap_means,
    interval,
    mcnemar,
    mean_pass_at_k,
    paired_difference,
    pass_at_k,
    question_means,
)


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_answer(samples):
    for correct in range(samples + 1):
        answers = [i < correct for i in range(samples)]
        for k in range(1, samples + 1):
            choices = [any(chosen) for chosen in itertools.combinations(answers, k)]
            assert pass_at_k(samples, correct, k) == pytest.approx(np.mean(choices), abs=1e-12)


@pytest.mark.parametrize(("samples", "correct", "k"), [(3, 1, 4), (3, 4, 1), (3, 1, 0), (3, -1, 1)])
def test_pass_at_k_outside_of_its_range_is_refused(samples, correct, k):
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(samples, correct, k)


def test_average_at_k_is_the_mean_of_the_questions_means():
    right = [[True, False], [True, True], [False, False]]
    found = average_at_k(right)
    assert found.value == pytest.approx(0.5)
    assert found.low < 0.5 < found.high
    assert mean_pass_at_k(right, 1) == pytest.approx(0.5)
    assert mean_pass_at_k(right, 2) == pytest.approx(2 / 3)


def test_bootstrap_has_the_spread_of_the_closed_form():
    values = np.random.default_rng(3).random(200)
    means = bootstrap_means(values, draws=40_000)
    assert means.mean() == pytest.approx(values.mean(), abs=1e-3)
    # The bootstrap's variance of a mean is the population variance over n.
    assert means.std() == pytest.approx(math.sqrt(values.var() / len(values)), rel=0.02)
    low, high = interval(values)
    half = 1.959964 * math.sqrt(values.var() / len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_samples_of_a_question_do_not_count_as_questions():
    """Copies of a question's answer carry no information: the interval stays as wide."""
    right = [[True], [False], [True], [True], [False]] * 4
    copied = [samples * 8 for samples in right]
    assert average_at_k(copied) == average_at_k(right)


def test_all_wrong_still_has_an_interval():
    found = average_at_k([[False]] * 200)
    assert (found.value, found.low) == (0, 0)
    # Clopper and Pearson: the chance of no success in 200 at this share is 2.5 %.
    assert (1 - found.high) ** 200 == pytest.approx(0.025)
    opposite = average_at_k([[True]] * 200)
    assert (opposite.value, opposite.high) == (1, 1)
    assert opposite.low == pytest.approx(1 - found.high)


def test_questions_of_one_share_still_have_an_interval():
    """Other questions may have another one, at most at the share of Clopper and Pearson."""
    others = 1 - 0.025 ** (1 / 30)
    found = average_at_k([[True, False]] * 30)
    assert (found.low, found.high) == pytest.approx((0.5 - others / 2, 0.5 + others / 2))
    same = paired_difference([[True]] * 30, [[True]] * 30)
    assert (same.low, same.high) == pytest.approx((-others, others))
    better = paired_difference([[True]] * 30, [[False]] * 30)
    assert (better.low, better.high) == pytest.approx((1 - 2 * others, 1))


def test_mcnemar_is_the_binomial_test():
    from scipy.stats import binomtest

    for better, worse in [(0, 0), (5, 5), (1, 9), (12, 3), (0, 6)]:
        expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
        assert mcnemar(better, worse) == pytest.approx(expected)


def test_paired_difference_is_tighter_than_two_intervals():
    generator = np.random.default_rng(5)
    first = [[bool(x)] for x in generator.random(300) < 0.5]
    second = [[x and i % 10 != 0] for i, (x,) in enumerate(first)]
    pair = paired_difference(first, second)
    lost = sum(x and i % 10 == 0 for i, (x,) in enumerate(first))
    assert (pair.better, pair.worse) == (lost, 0)
    assert pair.difference == pytest.approx(lost / 300)
    assert 0 < pair.low < pair.difference < pair.high
    assert pair.high - pair.low < average_at_k(first).high - average_at_k(first).low
    assert pair.p_value == pytest.approx(2 / 2**lost)


def test_equal_models_do_not_differ():
    right = [[True, False], [True, True]]
    pair = paired_difference(right, right)
    assert (pair.difference, pair.better, pair.worse, pair.p_value) == (0, 0, 0, None)
    with pytest.raises(ValueError, match="must be the same"):
        paired_difference(right, right[:1])
    with pytest.raises(ValueError, match="without a sample"):
        question_means([[True], []])
