"""Proximal SFT: the clipped surrogate of PPO with every target an action of advantage 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_profit.objectives.base import Objective, ObjectiveOutput, TokenStatistics, option
from megatron_profit.objectives.checks import number_in
from megatron_profit.objectives.numerics import count_of, log_ratio
from megatron_profit.objectives.registry import register_objective
from megatron_profit.objectives.sft import SFT

if TYPE_CHECKING:
    from torch import Tensor

# Bound on log(p / p_old) in nats, as in the released code; exp of it stays finite.
LOG_RATIO_LIMIT = 20.0


@register_objective("psft")
@dataclass(frozen=True)
class PSFT(Objective):
    """L_t = -min(r, clip(r, 1 - clip_low, 1 + clip_high)), r = p / p_old; weight r * 1[r <= 1 + clip_high].

    https://arxiv.org/abs/2508.17784 and its released code: token mean, log r clamped to +-20. The
    advantage is 1, so the lower clip never binds; ``clip_low`` only says from where on a token
    counts as ``ratio below clip`` in the metrics. p_old must be refreshed only every few optimizer
    steps: at p == p_old the gradient is exactly SFT's.

    Attributes:
        clip_low: in [0, 1].
        clip_high: 0 or more.

    Raises:
        ValueError: a value out of range.
    """

    clip_low: float = option(
        "the ratio counts as below the clip range under 1 - clip_low (logged; it never binds)",
        default=0.2,
        type=float,
    )
    clip_high: float = option(
        "a token whose probability has risen by more than this share is not trained further",
        default=0.28,
        type=float,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_low", number_in("clip_low", self.clip_low, 0, 1))
        object.__setattr__(self, "clip_high", number_in("clip_high", self.clip_high, 0))

    @property
    def required_statistics(self) -> frozenset[str]:
        return frozenset({"old_log_prob", "entropy"})

    def for_evaluation(self) -> Objective:
        """Return plain SFT: in an evaluation the old policy is the current one."""
        return SFT()

    def evaluate(self, statistics: TokenStatistics) -> ObjectiveOutput:
        log_r = _log_ratio(statistics)
        ratio = _clamped(log_r).exp()
        # min(r, clip(r, low, high)) is min(r, high): a ratio below `low` stays r itself.
        top = 1 + self.clip_high
        flat = (ratio > top) | (log_r.abs() > LOG_RATIO_LIMIT)
        return ObjectiveOutput(-ratio.masked_fill(ratio > top, top), ratio.masked_fill(flat, 0.0))

    def metrics(self, statistics: TokenStatistics) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return the clip fraction, the mean ratio, and Schulman's k3 estimate of a KL."""
        log_r = _clamped(_log_ratio(statistics))
        ratio = log_r.exp()
        count = count_of(ratio)
        return {
            "clip fraction": ((ratio > 1 + self.clip_high).sum(), count),
            "ratio below clip": ((ratio < 1 - self.clip_low).sum(), count),
            "mean ratio": (ratio.sum(), count),
            # Computed on targets, not on samples from the old policy: an indicator of drift, not a KL.
            "approximate KL": ((ratio - 1 - log_r).sum(), count),
        }


def _log_ratio(statistics: TokenStatistics) -> Tensor:
    """Return [N] log(p / p_old)."""
    return log_ratio(statistics.log_prob, statistics.old_log_prob)


def _clamped(log_r: Tensor) -> Tensor:
    """Clamp with a slope of exactly 1 on the bounds, where torch's slope may be one half."""
    limit = LOG_RATIO_LIMIT
    return log_r.masked_fill(log_r > limit, limit).masked_fill(log_r < -limit, -limit)
