"""The results of a comparison as Markdown and as a figure: spreads over seeds, intervals over questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, mean, stdev
from typing import TYPE_CHECKING

from checkpoint_conversion.engine.output import whole_file
from megatron_profit.evaluation.comparison.plan import ALL_WEIGHTS
from megatron_profit.evaluation.comparison.runs import TOKENS, Outcome
from megatron_profit.evaluation.estimators import (
    Estimate,
    PairedDifference,
    average_at_k,
    paired_difference,
)
from megatron_profit.evaluation.presentation.report import header, percent, row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELD_OUT, KEPT = "lm loss validation", "kept fraction"
type Measure = tuple[str, str]  # data set and task


def measures_of(outcomes: Sequence[Outcome]) -> list[Measure]:
    """Return the data sets with their tasks, in order."""
    return list(dict.fromkeys((o.data, task) for o in outcomes for task in o.scores))


def settings_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the settings of the runs, in order."""
    return [name for name in dict.fromkeys(o.setting for o in outcomes) if name is not None]


def _of(outcomes: Sequence[Outcome], setting: str | None, data: str) -> list[Outcome]:
    """Return the outcomes of a setting on a data set, one for each seed; of the base for None."""
    return [o for o in outcomes if (o.setting, o.data) == (setting, data)]


def scores_of(outcomes: Sequence[Outcome], setting: str | None, measure: Measure) -> list[float]:
    """Return one score for each seed of a setting; for the base (None), its one score."""
    data, task = measure
    return [o.scores[task] for o in _of(outcomes, setting, data) if task in o.scores]


def right_of(
    outcomes: Sequence[Outcome], setting: str | None, measure: Measure
) -> list[list[float]]:
    """Return [Q][seeds] the share of right samples of each question; empty where it is not known."""
    data, task = measure
    seeds = [o.right[task] for o in _of(outcomes, setting, data) if task in o.right]
    return [list(of_question) for of_question in zip(*seeds, strict=True)]


def interval_of(
    outcomes: Sequence[Outcome], setting: str | None, measure: Measure
) -> Estimate | None:
    """Return the mean with its interval over questions; None where the questions are not known."""
    right = right_of(outcomes, setting, measure)
    return average_at_k(right) if right else None


def difference_of(
    outcomes: Sequence[Outcome], setting: str, against: str | None, measure: Measure
) -> PairedDifference | None:
    """Return a setting minus another one (or the base) on the same questions; None where one is not known."""
    first = right_of(outcomes, setting, measure)
    second = right_of(outcomes, against, measure)
    return paired_difference(first, second) if first and second else None


def report(outcomes: Sequence[Outcome]) -> str:
    """Return all tables: scores, trainings, and the differences from the base and from the first setting."""
    first = settings_of(outcomes)[:1]
    against = [differences_table(outcomes, name) for name in (None, *first)]
    parts = [table(outcomes), unfinished_table(outcomes), *against]
    return "\n".join(filter(None, parts))


def score_cell(outcomes: Sequence[Outcome], setting: str | None, measure: Measure) -> str:
    """Return mean, spread over the seeds and interval. For example, "4.0 % (2.0 to 6.5)"."""
    estimate = interval_of(outcomes, setting, measure)
    around = f" ({percent(estimate.low)} to {percent(estimate.high)})" if estimate else ""
    return mean_and_spread(scores_of(outcomes, setting, measure)) + around


def columns_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the names of the measures for tables."""
    measures = measures_of(outcomes)
    several = len({data for data, _ in measures}) > 1
    return [f"{data}: {task}" if several else task for data, task in measures]


def differences_table(outcomes: Sequence[Outcome], against: str | None) -> str:
    """Return each setting minus another one (None: the base), paired by question; empty if none is known."""
    lines = header(f"minus {against or 'the base'}, points", *columns_of(outcomes))
    start = len(lines)
    for setting in settings_of(outcomes):
        found = [difference_of(outcomes, setting, against, m) for m in measures_of(outcomes)]
        if setting != against and any(found):
            lines.append(row(setting, *(difference_cell(each) for each in found)))
    return "\n".join(lines) + "\n" if len(lines) > start else ""


def difference_cell(pair: PairedDifference | None) -> str:
    """Return a difference with its interval and p-value. For example, "+3.0 (-0.5 to +6.5), p 0.12"."""
    if pair is None:
        return ""
    p_value = "" if pair.p_value is None else f", p {pair.p_value:.2g}"
    return (
        f"{100 * pair.difference:+.1f} ({100 * pair.low:+.1f} to {100 * pair.high:+.1f}){p_value}"
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the scores of each setting, then numbers of the trainings."""
    measures = measures_of(outcomes)
    lines = header("setting", *columns_of(outcomes))
    for setting in (None, *settings_of(outcomes)):
        cells = [score_cell(outcomes, setting, measure) for measure in measures]
        lines.append(row(setting or "the base", *cells))
    lines += ["", *header("data", "setting", "held-out cross-entropy", "kept, last tenth")]
    for data in dict.fromkeys(data for data, _ in measures):
        for setting in settings_of(outcomes):
            group = _of(outcomes, setting, data)
            if not group:
                continue
            held_out = [o.metrics[HELD_OUT] for o in group if HELD_OUT in o.metrics]
            kept = [last for _, last in filter(None, (tenths(o, KEPT) for o in group))]
            cells = [f"{mean(values):.3f}" if values else "" for values in (held_out, kept)]
            lines.append(row(data, setting, *cells))
    return "\n".join(lines) + "\n"


def unfinished_table(outcomes: Sequence[Outcome]) -> str:
    """Return the answers that the length limit cut, in percent; empty if none of a run is known."""
    if not any(outcome.unfinished for outcome in outcomes if outcome.run is not None):
        return ""
    lines = header("answers that were cut, %", *columns_of(outcomes))
    for setting in (None, *settings_of(outcomes)):
        found = [
            [o.unfinished[task] for o in _of(outcomes, setting, data) if task in o.unfinished]
            for data, task in measures_of(outcomes)
        ]
        if any(found):
            cells = [percent(mean(shares)) if shares else "" for shares in found]
            lines.append(row(setting or "the base", *cells))
    return "\n".join(lines) + "\n"


def tenths(outcome: Outcome, name: str) -> tuple[float, float] | None:
    """Return a metric's mean over the first and over the last tenth of the steps; None if it was not logged.

    Steps count by their supervised tokens, where these are known: the last step of an epoch may be small.
    """
    values, tokens = outcome.curves.get(name), outcome.curves.get(TOKENS, ())
    if not values:
        return None
    weights = tokens if len(tokens) == len(values) and all(tokens) else [1] * len(values)
    n = max(1, len(values) // 10)
    return fmean(values[:n], weights[:n]), fmean(values[-n:], weights[-n:])


def mean_and_spread(scores: Sequence[float]) -> str:
    """Return the mean in percent, and the standard deviation over the seeds if there are several."""
    if not scores:
        return ""
    spread = f" ± {100 * stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{100 * mean(scores):.1f}{spread} %"


def draw_comparison(outcomes: Sequence[Outcome], file: Path) -> None:
    """Draw a panel for each measure: over the ranks if a setting has several, else a column of settings."""
    runs = {(o.run.without_rank.setting, o.run.lora_rank) for o in outcomes if o.run is not None}
    several = len(runs) > len({setting for setting, _ in runs})
    figure = _over_ranks(outcomes) if several else _settings_in_a_column(outcomes)
    with whole_file(file) as stream:
        figure.savefig(stream, format="png", dpi=150)


def _settings_in_a_column(outcomes: Sequence[Outcome]) -> Figure:
    """Return panels with a dot for each seed, a bar at the mean and a line at the base."""
    from matplotlib.figure import Figure

    measures, settings = measures_of(outcomes), settings_of(outcomes)
    size = (2.2 + 2.8 * len(measures), 1.2 + 0.36 * len(settings))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axis, measure in zip(axes, measures, strict=True):
        for y, setting in enumerate(reversed(settings)):
            values = [100 * score for score in scores_of(outcomes, setting, measure)]
            if estimate := interval_of(outcomes, setting, measure):
                reach = [100 * estimate.low, 100 * estimate.high]
                axis.plot(reach, [y, y], color="#57606a", lw=1.2, alpha=0.7)
            if values:
                axis.plot([mean(values)] * 2, [y - 0.3, y + 0.3], color="#b3261e", lw=2, zorder=3)
                axis.scatter(values, [y] * len(values), s=22, color="#0550ae", alpha=0.65, zorder=4)
        for base in scores_of(outcomes, None, measure):
            axis.axvline(100 * base, color="#57606a", ls="--", lw=1)
        axis.set_yticks(range(len(settings)), list(reversed(settings)))
        axis.set_title(": ".join(dict.fromkeys(measure)), fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel(
        "answers right, % (a dot a seed, bar: mean, line: 95 % interval, dashed: the base)",
        fontsize=10,
    )
    return figure


def _over_ranks(outcomes: Sequence[Outcome]) -> Figure:
    """Return panels with a line through the means at all ranks, a dot a seed, and a line at the base."""
    from matplotlib.figure import Figure

    measures = measures_of(outcomes)
    runs = [o.run for o in outcomes if o.run is not None]
    ranks = sorted({run.lora_rank for run in runs}, key=lambda rank: (rank == ALL_WEIGHTS, rank))
    names = ["all weights" if rank == ALL_WEIGHTS else str(rank) for rank in ranks]
    figure = Figure(figsize=(1.8 + 2.9 * len(measures), 3.6), layout="constrained")
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    lines = list(dict.fromkeys(run.without_rank.setting for run in runs))
    for axis, measure in zip(axes, measures, strict=True):
        for number, line in enumerate(lines):
            found = [
                (ranks.index(o.run.lora_rank), 100 * o.scores[measure[1]])
                for o in outcomes
                if o.run is not None
                and o.data == measure[0]
                and measure[1] in o.scores
                and o.run.without_rank.setting == line
            ]
            if not found:
                continue
            places = sorted({x for x, _ in found})
            means = [mean(y for x, y in found if x == place) for place in places]
            axis.plot(places, means, color=f"C{number}", lw=1.5, label=line)
            axis.scatter(*zip(*found, strict=True), s=18, color=f"C{number}", alpha=0.6, zorder=4)
        for base in scores_of(outcomes, None, measure):
            axis.axhline(100 * base, color="#57606a", ls="--", lw=1)
        axis.set_xticks(range(len(ranks)), names)
        axis.set_title(": ".join(dict.fromkeys(measure)), fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("answers right, %")
    axes[0].legend(fontsize=8)
    figure.supxlabel("rank of the adapters (dashed: the base)", fontsize=10)
    return figure
