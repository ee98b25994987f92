"""The token report as one self-contained HTML page: no network, no library, no build step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch

from megatron_profit.token_report.embedding import with_data
from megatron_profit.token_report.scores import TokenRecord

_TEMPLATE = "page.html"


def page(
    records: Sequence[TokenRecord],
    *,
    title: str,
    subtitle: str = "",
    threshold: tuple[float, ...] = (0.1,),
    direction: str = "higher",
    scope: str = "constant",
    signal: str = "current",
) -> str:
    """Return the page of chosen records.

    Args:
        records: at least one, all with the same objectives.
        title, subtitle: plain text.
        threshold: where the slider begins; a second value for the direction middle.
        direction: higher, lower or middle.
        scope: constant for probabilities, or the tokens whose quantiles they are: global_batch or record.
        signal: current for the model's probabilities, reference for the reference model's.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError("there is no record to show")
    data = {
        "title": title,
        "subtitle": subtitle,
        "threshold": [threshold[0], threshold[-1] if len(threshold) > 1 else 1.0],
        "direction": direction,
        "scope": scope,
        "signal": signal,
        "objectives": list(records[0].weights),
        "records": [_record(record) for record in records],
    }
    template = files("megatron_profit.token_report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return with_data(template, data)


def _record(record: TokenRecord) -> dict[str, Any]:
    of_reference = record.statistics.external.get("ref_log_prob")
    return {
        "name": record.name,
        "pieces": record.pieces,
        "supervised": record.supervised.int().tolist(),
        "p": _numbers(record.statistics.prob),
        # The probability under the reference model, where there is one.
        "q": None if of_reference is None else _numbers(of_reference.exp()),
        "weights": {name: _numbers(weight) for name, weight in record.weights.items()},
    }


def _numbers(vector: torch.Tensor) -> list[float | None]:
    """Return the numbers for JSON, with null for NaN, which JSON does not have.

    Nine digits tell all float32 apart, so that a threshold falls where it fell in training.
    """
    return [None if math.isnan(x) else float(f"{x:.9g}") for x in vector.tolist()]
