"""Estimates from samples of graded answers, with their uncertainty.

Shape suffixes: Q questions, S samples of a question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval."""

    value: float
    low: float
    high: float


def average_at_k(right: Sequence[Sequence[float]]) -> Estimate:
    """Return avg@k: the mean over questions of the share of samples that are right.

    The interval covers the questions and, since each question brings its samples, the draws of its samples
    too; see `interval`.

    Args:
        right: [Q][S] whether each sample is right; a mean of several samples is allowed too.

    Raises:
        ValueError: There is no question.
    """
    means = question_means(right)
    return Estimate(float(means.mean()), *interval(means))


def question_means(right: Sequence[Sequence[float]]) -> np.ndarray:
    """Return [Q] the share of each question's samples that is right."""
    if not right or not all(right):
        raise ValueError("there is a question without a sample, or no question")
    return np.array([sum(samples) / len(samples) for samples in right])


def bootstrap_means(values: np.ndarray, *, draws: int = DRAWS) -> np.ndarray:
    """Return [draws] means of samples of the values with replacement, the same ones each time."""
    generator = np.random.default_rng(0)
    size, means = len(values), np.empty(draws)
    at_a_time = max(1, 4_000_000 // size)
    for start in range(0, draws, at_a_time):
        count = min(at_a_time, draws - start)
        chosen = generator.integers(size, size=(count, size))
        means[start : start + count] = values[chosen].mean(axis=1)
    return means


def interval(values: np.ndarray, *, least: float = 0.0) -> tuple[float, float]:
    """Return the confidence interval of the mean of [Q] values between `least` and 1.

    It is the percentile bootstrap over questions. Where all values are the same, a bootstrap would have no
    width. Then a share of all questions may have other values, as large as Clopper and Pearson's interval
    allows after none was seen. For example, 10 right answers of 10 give 0.69 to 1.
    """
    tail = (1 - LEVEL) / 2
    if (values == values[0]).all():
        same, others = float(values[0]), 1 - tail ** (1 / len(values))
        return same - others * (same - least), same + others * (1 - same)
    low, high = np.percentile(bootstrap_means(values), [100 * tail, 100 - 100 * tail])
    return float(low), float(high)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of pass@k of a question (Chen et al., 2021): 1 - C(n - c, k) / C(n, k).

    Args:
        samples: n, the answers drawn.
        correct: c, how many are right.
        k: Answers that one may give; at most n.

    Raises:
        ValueError: k is not in 1 to n, or c not in 0 to n.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} right among {samples} samples is not defined")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_pass_at_k(right: Sequence[Sequence[bool]], k: int) -> float:
    """Return the mean over questions of pass@k."""
    return float(np.mean([pass_at_k(len(samples), sum(samples), k) for samples in right]))


@dataclass(frozen=True)
class PairedDifference:
    """Model A against model B on the same questions.

    Attributes:
        difference: avg@k of A minus avg@k of B.
        low, high: Confidence interval over questions, see `interval`.
        better, worse: Questions on which A's share of right samples is higher, and lower.
        p_value: Of McNemar's exact test, where each question has one sample; else None.
    """

    difference: float
    low: float
    high: float
    better: int
    worse: int
    p_value: float | None


def paired_difference(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]
) -> PairedDifference:
    """Compare two models on the same questions in the same order.

    Args:
        first, second: [Q][S] whether each sample is right; a mean of several samples is allowed too.

    Raises:
        ValueError: The questions differ in number.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} questions against {len(second)}; they must be the same")
    gains = question_means(first) - question_means(second)
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    single = all(len(samples) == 1 and samples[0] in (0, 1) for samples in (*first, *second))
    low, high = interval(gains, least=-1.0)
    p_value = mcnemar(better, worse) if single else None
    return PairedDifference(float(gains.mean()), low, high, better, worse, p_value)


def mcnemar(better: int, worse: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Under the null hypothesis each question on which the two models differ is a fair coin.

    Args:
        better, worse: Questions that only the first, and only the second, model answers right.
    """
    differing = better + worse
    tail = sum(math.comb(differing, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**differing)
