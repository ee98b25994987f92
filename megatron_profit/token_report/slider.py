"""The start of the page's threshold, from the objectives that the page is about."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from megatron_profit.objectives import Objective
from megatron_profit.objectives.thresholds import ThresholdObjective


class SliderStart(TypedDict, total=False):
    """Arguments of ``page``; without them, the page has a start of its own."""

    threshold: tuple[float, ...]
    direction: str
    scope: str
    signal: str


def slider_start(objectives: Iterable[Objective]) -> SliderStart:
    """Return the threshold of the first objective that has one, if any does."""
    for objective in objectives:
        if not isinstance(objective, ThresholdObjective):
            continue
        threshold = objective.prob_threshold or objective.threshold_quantile
        if not threshold or not objective.threshold_direction:
            continue
        scope = objective.threshold_scope or "constant"
        return {
            "threshold": threshold,
            "direction": objective.threshold_direction,
            # The page's tokens stand for the recent steps'.
            "scope": "global_batch" if scope == "running" else scope,
            "signal": "reference" if objective.signal_reads else "current",
        }
    return {}
