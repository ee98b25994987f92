"""Selection of tokens by the probability of their target, for the objectives that offer it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_profit.objectives.base import TokenStatistics, option
from megatron_profit.objectives.checks import flatten, number_in, one_of
from megatron_profit.objectives.numerics import count_of
from megatron_profit.objectives.quantiles import (
    MAX_LOG_PROB,
    MIN_LOG_PROB,
    bounds_of_groups,
    record_sizes,
)
from megatron_profit.objectives.signals import SignalObjective

if TYPE_CHECKING:
    from torch import Tensor

THRESHOLD_DIRECTIONS = ("higher", "lower", "middle", "random")
THRESHOLD_SCOPES = ("global_batch", "record", "running")
# The bounds on p of each direction.
_BOUNDS = {
    "higher": (MIN_LOG_PROB,),
    "lower": (MAX_LOG_PROB,),
    "middle": (MIN_LOG_PROB, MAX_LOG_PROB),
}
_BEYOND: Mapping[str, Callable[..., Any]] = {MIN_LOG_PROB: operator.lt, MAX_LOG_PROB: operator.gt}


@dataclass(frozen=True)
class ThresholdObjective(SignalObjective):
    """An objective on the tokens that a threshold keeps, M = 1; the others are dropped, M = 0.

    ========= ============================== =============================
    direction option                         a token is kept when
    ========= ============================== =============================
    higher    ``prob_threshold`` tau         p >= tau
    lower     ``prob_threshold`` tau         p <= tau
    middle    ``prob_threshold`` t0 t1       t0 <= p <= t1
    random    ``keep_fraction`` r            uniform < r, whatever p is
    ========= ============================== =============================

    ``threshold_quantile`` takes the place of ``prob_threshold``: the threshold is then the quantile of p over
    some tokens. For example, ``higher`` at 0.2 drops the 20 % of least probability. The tokens are the global
    batch's, the record's, or (running) the recent steps'. Whoever sees them computes the bounds with
    ``look_ahead`` and passes them as the statistics ``min_log_prob`` and ``max_log_prob``.

    p is the probability under the signal (see ``SignalObjective``). A NaN probability is never dropped, so
    that it shows in the loss.

    Attributes:
        prob_threshold: one or two probabilities in [0, 1]. Takes a number, a sequence, or
            strings such as "0.1", "0.3 0.7" and "0.3,0.7"; always a tuple of floats afterwards.
        threshold_direction: higher, lower, middle or random.
        keep_fraction: share of tokens that ``random`` keeps, in [0, 1].
        threshold_quantile: one or two quantiles in [0, 1], in the same forms as ``prob_threshold``.
        threshold_scope: the tokens of the quantile: global_batch (also when it is None), record or running.

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
    threshold_quantile: tuple[float, ...] | None = option(
        "in place of a probability, the quantile of the tokens' probabilities that is the threshold, in "
        "[0, 1]: higher at 0.2 drops the least probable 20 %; two values for middle",
        nargs="+",
        metavar="Q",
    )
    threshold_scope: str | None = option(
        "the tokens that the quantile is of: the step's, exactly, for one more forward pass (global_batch, "
        "the default); each record's, for the same price (record); or those of the recent steps, for no "
        "pass (running)",
        choices=THRESHOLD_SCOPES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("threshold_direction", self.threshold_direction, THRESHOLD_DIRECTIONS)
        if self.threshold_direction == "random":
            self._check_keep_fraction()
        else:
            self._check_thresholds()

    def _check_keep_fraction(self) -> None:
        for name in ("prob_threshold", "threshold_quantile", "threshold_scope"):
            if (given := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={given!r} has no meaning for threshold_direction='random'; remove it and set "
                    "keep_fraction (0.7 keeps 70 %)."
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
        direction = self.threshold_direction
        if self.keep_fraction is not None:
            raise ValueError(
                f"keep_fraction={self.keep_fraction!r} is only for threshold_direction='random', "
                f"not {direction!r}; remove it, or set threshold_direction='random'."
            )
        name = "prob_threshold" if self.threshold_quantile is None else "threshold_quantile"
        given = getattr(self, name)
        if given is None:
            raise ValueError(
                f"prob_threshold is missing for threshold_direction={direction!r}; "
                "set it in [0, 1], or set threshold_quantile."
            )
        self._check_scope()
        values = tuple(number_in(name, value, 0, 1) for value in flatten(given))
        wanted = 2 if direction == "middle" else 1
        if len(values) != wanted:
            raise ValueError(
                f"{name}={given!r} holds {len(values)} value(s); "
                f"threshold_direction={direction!r} takes {wanted}."
            )
        if values[0] > values[-1]:
            raise ValueError(
                f"{name}={given!r} is an empty interval; give the lower threshold first."
            )
        object.__setattr__(self, name, values)

    def _check_scope(self) -> None:
        if self.threshold_quantile is None:
            if self.threshold_scope is not None:
                raise ValueError(
                    f"threshold_scope={self.threshold_scope!r} says which tokens threshold_quantile is of, "
                    "and there is none; remove it, or set threshold_quantile instead of prob_threshold."
                )
            return
        if self.prob_threshold is not None:
            raise ValueError(
                f"prob_threshold={self.prob_threshold!r} and threshold_quantile="
                f"{self.threshold_quantile!r} are two thresholds; remove one of them."
            )
        scope = self.threshold_scope or THRESHOLD_SCOPES[0]
        one_of("threshold_scope", scope, THRESHOLD_SCOPES)
        object.__setattr__(self, "threshold_scope", scope)

    @property
    def loss_follows_prob(self) -> bool:
        # Below the threshold a token has no loss. A constant and a quantile of earlier steps let more tokens
        # fall below it; a quantile of these tokens keeps its share of them.
        known_before = self.prob_threshold is not None or self.threshold_scope == "running"
        may_drop_more = known_before and self.threshold_direction != "lower"
        return super().loss_follows_prob or not may_drop_more

    @property
    def quantile_of(self) -> Mapping[str, float]:
        """The quantile of each bound on log p that follows from one; empty for a constant threshold."""
        if self.threshold_quantile is None or self.threshold_direction is None:
            return {}
        return dict(zip(_BOUNDS[self.threshold_direction], self.threshold_quantile, strict=True))

    @property
    def own_statistics(self) -> frozenset[str]:
        if self.threshold_direction == "random":
            return frozenset({"uniform"})
        return frozenset(self.quantile_of)

    @property
    def lookahead(self) -> Mapping[str, frozenset[str]]:
        if self.threshold_scope == "running":
            return {}
        return dict.fromkeys(self.quantile_of, self.signal_reads)

    def look_ahead(self, statistics: TokenStatistics) -> Mapping[str, Tensor]:
        """Return the bounds of quantiles of these tokens, whichever scope they are for."""
        signal = self.seen(statistics).log_prob.detach()
        sizes = [len(signal)]
        if self.threshold_scope == "record":
            sizes = record_sizes(statistics.record)
        return {
            bound: bounds_of_groups(bound, signal, quantile, sizes)
            for bound, quantile in self.quantile_of.items()
        }

    def kept(self, statistics: TokenStatistics) -> Tensor:
        """Return M, [N] bool."""
        if self.threshold_direction == "random":
            assert self.keep_fraction is not None
            return statistics.uniform < self.keep_fraction
        assert self.threshold_direction is not None
        prob, log_prob = statistics.prob, statistics.log_prob
        bounds = _BOUNDS[self.threshold_direction]
        if self.prob_threshold is None:
            beyond = [_BEYOND[name](log_prob, getattr(statistics, name)) for name in bounds]
        else:
            pairs = zip(bounds, self.prob_threshold, strict=True)
            beyond = [strictly_beyond(_BEYOND[name], prob, log_prob, tau) for name, tau in pairs]
        return ~(beyond[0] | beyond[-1])

    def metrics(self, statistics: TokenStatistics) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return the thresholds of the step; in the scope ``record``, their mean over the tokens."""
        if self.threshold_direction in (None, "random"):
            return {}
        assert self.threshold_direction is not None
        bounds = _BOUNDS[self.threshold_direction]
        names = ("threshold",) if len(bounds) == 1 else ("lower threshold", "upper threshold")
        count = count_of(statistics.log_prob)
        if self.prob_threshold is None:
            sums = [getattr(statistics, bound).double().exp().sum() for bound in bounds]
        else:
            sums = [count.double() * tau for tau in self.prob_threshold]
        return {name: (total, count) for name, total in zip(names, sums, strict=True)}


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
