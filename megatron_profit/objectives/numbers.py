"""Numbers given as options, checked."""

from __future__ import annotations

import math
from typing import Any


def number_in(
    name: str, value: Any, low: float, high: float = math.inf, *, low_open: bool = False
) -> float:
    """``value`` as a float in [low, high], or in (low, high] with ``low_open``.

    Raises:
        ValueError: it is not; the message names the option, the value and the interval.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    above = number > low if low_open else number >= low
    if above and number <= high and math.isfinite(number):
        return number
    interval = f"{'(' if low_open else '['}{low:g}, {high:g}{']' if math.isfinite(high) else ')'}"
    raise ValueError(f"{name} {value!r} is not a number in {interval}; give one inside.")
