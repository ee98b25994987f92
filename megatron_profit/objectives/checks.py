"""Checks of option values that objectives share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any


def number_in(
    name: str, value: Any, low: float, high: float = math.inf, *, low_open: bool = False
) -> float:
    """Return ``value`` as a finite float in [low, high], or in (low, high] with ``low_open``.

    Raises:
        ValueError: it is outside; the message names the option, the value and the interval.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    above = number > low if low_open else number >= low
    if above and number <= high and math.isfinite(number):
        return number
    left = "(" if low_open or math.isinf(low) else "["
    interval = f"{left}{low:g}, {high:g}{']' if math.isfinite(high) else ')'}"
    raise ValueError(f"{name} {value!r} is not a number in {interval}; give one from there.")


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a value that is not among ``choices`` with a ValueError that lists them."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; set it to one of {', '.join(choices)}.")


def flatten(value: Any) -> Iterator[Any]:
    """Yield the single values in "0.3,0.7", "0.3 0.7", [0.3, 0.7], ["0.3", "0.7"] or 0.3.

    For example, "0.3,0.7" gives "0.3" and "0.7".
    """
    if isinstance(value, str):
        yield from value.replace(",", " ").split()
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from flatten(item)
    else:
        yield value
