"""Selection of tokens by the probability of their target, for the objectives that offer it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_profit.objectives.base import Objective, TokenStatistics, option
from megatron_profit.objectives.checks import flatten, number_in, one_of

if TYPE_CHECKING:
    from torch import Tensor

THRESHOLD_DIRECTIONS = ("higher", "lower", "middle", "random")


@dataclass(frozen=True)
class ThresholdObjective(Objective):
    """An objective on the tokens that a threshold keeps, M = 1; the others are dropped, M = 0.

    ========= ============================== =============================
    direction option                         a token is kept when
    ========= ============================== =============================
    higher    ``prob_threshold`` tau         p >= tau
    lower     ``prob_threshold`` tau         p <= tau
    middle    ``prob_threshold`` t0 t1       t0 <= p <= t1
    random    ``keep_fraction`` r               uniform < r, whatever p is
    ========= ============================== =============================

    A NaN probability is never dropped, so that it shows in the loss.

    Attributes:
        prob_threshold: one or two probabilities in [0, 1]. Takes a number, a sequence, or
            strings such as "0.1", "0.3 0.7" and "0.3,0.7"; always a tuple of floats afterwards.
        threshold_direction: higher, lower, middle or random.
        keep_fraction: share of tokens that ``random`` keeps, in [0, 1].

    Raises:
        ValueError: a missing, surplus, unparsable or out-of-range option.
    """

    prob_threshold: tuple[float, ...] | None = option(
        "probability that a target token is compared with, in [0, 1]; two values for middle",
        nargs="+",
        metavar="TAU",
    )
    threshold_direction: str | None = option(
        "which tokens to train: those at or above the threshold (higher), at or below it (lower), "
        "between two thresholds (middle), or a random share of keep_fraction (random)",
        choices=THRESHOLD_DIRECTIONS,
    )
    keep_fraction: float | None = option(
        "share of tokens that the direction random KEEPS, in [0, 1]: 0.7 keeps 7 of 10", type=float
    )

    def __post_init__(self) -> None:
        one_of("threshold_direction", self.threshold_direction, THRESHOLD_DIRECTIONS)
        if self.threshold_direction == "random":
            self._check_keep_fraction()
        else:
            self._check_thresholds()

    def _check_keep_fraction(self) -> None:
        if self.prob_threshold is not None:
            raise ValueError(
                f"prob_threshold={self.prob_threshold!r} has no meaning for "
                "threshold_direction='random'; remove it and set keep_fraction (0.7 keeps 70 %)."
            )
        if self.keep_fraction is None:
            raise ValueError(
                "keep_fraction is missing for threshold_direction='random'; "
                "set it in [0, 1] (0.7 keeps 70 % of the tokens)."
            )
        object.__setattr__(
            self, "keep_fraction", number_in("keep_fraction", self.keep_fraction, 0, 1)
        )

    def _check_thresholds(self) -> None:
        direction, given = self.threshold_direction, self.prob_threshold
        if self.keep_fraction is not None:
            raise ValueError(
                f"keep_fraction={self.keep_fraction!r} is only for threshold_direction='random', "
                f"not {direction!r}; remove it, or set threshold_direction='random'."
            )
        if given is None:
            raise ValueError(
                f"prob_threshold is missing for threshold_direction={direction!r}; "
                "set it in [0, 1]."
            )
        values = tuple(number_in("prob_threshold", value, 0, 1) for value in flatten(given))
        wanted = 2 if direction == "middle" else 1
        if len(values) != wanted:
            raise ValueError(
                f"prob_threshold={given!r} holds {len(values)} value(s); "
                f"threshold_direction={direction!r} takes {wanted}."
            )
        if values[0] > values[-1]:
            raise ValueError(
                f"prob_threshold={given!r} is an empty interval; give the lower threshold first."
            )
        object.__setattr__(self, "prob_threshold", values)

    @property
    def required_statistics(self) -> frozenset[str]:
        return frozenset({"uniform"} if self.threshold_direction == "random" else ())

    def kept(self, statistics: TokenStatistics) -> Tensor:
        """Return M, [N] bool."""
        if self.threshold_direction == "random":
            assert self.keep_fraction is not None
            return statistics.uniform < self.keep_fraction
        assert self.prob_threshold is not None
        low, high = self.prob_threshold[0], self.prob_threshold[-1]
        prob, log_prob = statistics.prob, statistics.log_prob
        if self.threshold_direction == "higher":
            return ~strictly_beyond(operator.lt, prob, log_prob, low)
        kept = ~strictly_beyond(operator.gt, prob, log_prob, high)
        if self.threshold_direction == "middle":
            kept &= ~strictly_beyond(operator.lt, prob, log_prob, low)
        return kept


def strictly_beyond(
    compare: Callable[..., Tensor], prob: Tensor, log_prob: Tensor, tau: float
) -> Tensor:
    """Return [N] bool: p is strictly below (``operator.lt``) or above (``operator.gt``) tau.

    A p that equals tau must not fall on either side, and rounding decides which form shows the equality: p
    itself after a softmax, log p when only the logarithm is known. Both must agree. For example, a float32
    0.1 may be 0.09999999 as exp(log p); its log p still equals log 0.1.
    """
    import torch

    log_tau = torch.tensor(tau, dtype=log_prob.dtype).log()
    return compare(prob, tau) & compare(log_prob, log_tau)
