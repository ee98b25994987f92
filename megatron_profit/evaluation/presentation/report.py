"""Results of several models as a table, with paired differences, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

from megatron_profit.evaluation.estimators import PairedDifference, paired_difference
from megatron_profit.evaluation.run import Result


def percent(share: float) -> str:
    """Return a share for a table."""
    return f"{100 * share:.1f}"


def row(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def header(*names: str) -> list[str]:
    """Return the two lines that begin a Markdown table."""
    return [row(*names), "|---" * len(names) + "|"]


def scores_table(results: Sequence[Result]) -> str:
    """Return a Markdown table with a line for each model and task."""
    lines = header(
        "task",
        "model",
        "avg@k, %",
        "95 % interval",
        "pass@k, %",
        "no end, %",
        "no answer, %",
        "tokens",
    )
    for result in results:
        samples, most = result.sampling.samples, max(result.pass_at)
        lines.append(
            row(
                f"{result.task} ({len(result.right):,})",
                result.model,
                f"{percent(result.average.value)} (k = {samples})",
                f"{percent(result.average.low)} to {percent(result.average.high)}",
                f"{percent(result.pass_at[most])} (k = {most})" if most > 1 else "",
                percent(result.unfinished),
                percent(result.unparsed),
                f"{result.tokens:.0f}",
            )
        )
    return "\n".join(lines) + "\n"


def metrics_table(results: Sequence[Result]) -> str:
    """Return a table of the tasks' own metrics; empty without any."""
    lines = header("task", "model", "metric", "mean, %")
    start = len(lines)
    lines += [
        row(result.task, result.model, name, percent(value))
        for result in results
        for name, value in result.metrics.items()
    ]
    return "\n".join(lines) + "\n" if len(lines) > start else ""


def pairs(results: Sequence[Result]) -> list[tuple[Result, Result, PairedDifference]]:
    """Return each later model against each earlier one on each task: the gain of the later one."""
    return [
        (later, earlier, paired_difference(later.right, earlier.right))
        for earlier, later in combinations(results, 2)
        if earlier.task == later.task
    ]


def pairs_table(results: Sequence[Result]) -> str:
    """Return a table of paired differences; empty for a single model."""
    found = pairs(results)
    if not found:
        return ""
    lines = header(
        "task",
        "models",
        "difference, points",
        "95 % interval",
        "better on",
        "worse on",
        "McNemar's p",
    )
    for later, earlier, pair in found:
        p_value = "" if pair.p_value is None else f"{pair.p_value:.3g}"
        lines.append(
            row(
                later.task,
                f"{later.model} - {earlier.model}",
                f"{100 * pair.difference:+.1f}",
                f"{100 * pair.low:+.1f} to {100 * pair.high:+.1f}",
                pair.better,
                pair.worse,
                p_value,
            )
        )
    return "\n".join(lines) + "\n"


def markdown(results: Sequence[Result]) -> str:
    """Return the whole report: settings, scores, metrics, differences."""
    settings = dict.fromkeys(
        f"- {result.task}: {result.sampling}; {result.engine}" for result in results
    )
    tables = (scores_table(results), metrics_table(results), pairs_table(results))
    return "\n".join(["\n".join(settings) + "\n", *filter(None, tables)])


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """Return the results for a JSON file, without the single answers."""
    kept = []
    for result in results:
        entry = asdict(replace(result, answers={})) | {"questions": len(result.answers)}
        del entry["answers"]
        kept.append(entry)
    differences = [
        {"task": later.task, "model": later.model, "against": earlier.model, **asdict(pair)}
        for later, earlier, pair in pairs(results)
    ]
    return {"results": kept, "differences": differences}
