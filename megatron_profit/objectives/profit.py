"""ProFit: cross-entropy on the tokens whose probability under the model passes a threshold.

Equations 4-5 of https://arxiv.org/abs/2601.09195. Where the paper's text (keep p > tau) and its
released code (drop p < tau) differ, the code is followed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_profit.objectives.base import Objective, ObjectiveOutput, TokenStatistics, option
from megatron_profit.objectives.registry import register_objective

THRESHOLD_DIRECTIONS = ("higher", "lower", "middle", "random")


@register_objective("profit")
@dataclass(frozen=True)
class ProFit(Objective):
    """L_t = -M_t log p_t with M_t = 1 for a kept token and 0 for a dropped one; weight M_t.

    ========= ============================== =============================
    direction option                         a token is kept when
    ========= ============================== =============================
    higher    ``prob_threshold`` tau         p >= tau
    lower     ``prob_threshold`` tau         p <= tau
    middle    ``prob_threshold`` t0 t1       t0 <= p <= t1
    random    ``keep_ratio`` r               uniform < r, whatever p is
    ========= ============================== =============================

    A NaN probability is never dropped, so that it shows in the loss.

    The released code gives ``random`` a threshold tau and *drops* with probability tau:
    ``keep_ratio = 1 - tau``, so its 0.3 is ``keep_ratio=0.7`` here, which keeps 70 % of the tokens.

    Attributes:
        prob_threshold: one or two probabilities in [0, 1]. Takes a number, a sequence, or
            strings such as "0.1", "0.3 0.7" and "0.3,0.7"; always a tuple of floats afterwards.
        threshold_direction: higher, lower, middle or random.
        keep_ratio: share of tokens that ``random`` keeps, in [0, 1].

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
        "between two thresholds (middle), or a random share of keep_ratio (random)",
        choices=THRESHOLD_DIRECTIONS,
    )
    keep_ratio: float | None = option(
        "share of tokens that the direction random KEEPS, in [0, 1]: 0.7 keeps 7 of 10", type=float
    )

    def __post_init__(self) -> None:
        if self.threshold_direction not in THRESHOLD_DIRECTIONS:
            raise ValueError(
                f"threshold_direction is {self.threshold_direction!r}; "
                f"set it to one of {', '.join(THRESHOLD_DIRECTIONS)}."
            )
        if self.threshold_direction == "random":
            self._settle_keep_ratio()
        else:
            self._settle_thresholds()

    def _settle_keep_ratio(self) -> None:
        if self.prob_threshold is not None:
            raise ValueError(
                f"prob_threshold={self.prob_threshold!r} has no meaning for "
                "threshold_direction='random'; remove it and set keep_ratio (0.7 keeps 70 %)."
            )
        if self.keep_ratio is None:
            raise ValueError(
                "keep_ratio is missing for threshold_direction='random'; "
                "set it in [0, 1] (0.7 keeps 70 % of the tokens)."
            )
        object.__setattr__(self, "keep_ratio", _unit_interval("keep_ratio", self.keep_ratio))

    def _settle_thresholds(self) -> None:
        direction, given = self.threshold_direction, self.prob_threshold
        if self.keep_ratio is not None:
            raise ValueError(
                f"keep_ratio={self.keep_ratio!r} is only for threshold_direction='random', "
                f"not {direction!r}; remove it, or set threshold_direction='random'."
            )
        if given is None:
            raise ValueError(
                f"prob_threshold is missing for threshold_direction={direction!r}; "
                "set it in [0, 1]."
            )
        values = tuple(_unit_interval("prob_threshold", value) for value in _flatten(given))
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

    def evaluate(self, statistics: TokenStatistics) -> ObjectiveOutput:
        kept = self._kept(statistics)
        loss = -statistics.log_prob
        # where, not a product: a dropped token may have an infinite loss, and inf * 0 is NaN.
        return ObjectiveOutput(torch.where(kept, loss, torch.zeros_like(loss)), kept.to(loss.dtype))

    def _kept(self, statistics: TokenStatistics) -> Tensor:
        """[N] bool."""
        if self.threshold_direction == "random":
            assert statistics.uniform is not None
            assert self.keep_ratio is not None
            return statistics.uniform < self.keep_ratio
        assert self.prob_threshold is not None
        low, high = self.prob_threshold[0], self.prob_threshold[-1]
        dropped = torch.zeros_like(statistics.log_prob, dtype=torch.bool)
        if self.threshold_direction in ("higher", "middle"):
            dropped |= _compare(torch.lt, statistics, low)
        if self.threshold_direction in ("lower", "middle"):
            dropped |= _compare(torch.gt, statistics, high)
        return ~dropped


def _compare(strictly: Any, statistics: TokenStatistics, tau: float) -> Tensor:
    """[N] bool: p is strictly below (``torch.lt``) or above (``torch.gt``) tau.

    A p that equals tau must not fall on either side, and rounding decides which form shows the
    equality: p itself after a softmax, log p when only the logarithm is known. Both must agree.
    """
    log_tau = torch.tensor(tau, dtype=statistics.log_prob.dtype).log().item()
    return strictly(statistics.prob, tau) & strictly(statistics.log_prob, log_tau)


def _flatten(value: Any) -> Iterator[Any]:
    """Single values in "0.3,0.7", "0.3 0.7", [0.3, 0.7], ["0.3", "0.7"] or 0.3."""
    if isinstance(value, str):
        yield from value.replace(",", " ").split()
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flatten(item)
    else:
        yield value


def _unit_interval(name: str, value: Any) -> float:
    """``value`` as a float in [0, 1], or a ValueError that names the option."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} {value!r} is not a number in [0, 1]; give one such as 0.1.")
    return number
