"""The results of several models as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from checkpoint_conversion.engine.output import whole_file
from megatron_profit.evaluation.run import Result

# Colour-blind safe, from Okabe and Ito.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def draw_scores(results: Sequence[Result], file: Path) -> None:
    """Draw a panel for each task: avg@k of each model with its interval, into a PNG.

    Args:
        results: At least one.
        file: The file to write, whole or not at all.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(result.task for result in results))
    models = list(dict.fromkeys(result.model for result in results))
    size = (1.5 + 2.8 * len(tasks), 1.3 + 0.42 * len(models))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axis, task in zip(axes, tasks, strict=True):
        of_task = {result.model: result.average for result in results if result.task == task}
        for y, model in enumerate(reversed(models)):
            mean = of_task[model]
            reach = [[100 * (mean.value - mean.low)], [100 * (mean.high - mean.value)]]
            colour = _COLOURS[models.index(model) % len(_COLOURS)]
            axis.errorbar(
                100 * mean.value, y, xerr=reach, fmt="o", color=colour, capsize=4, linewidth=1.6
            )
        axis.set_yticks(range(len(models)), list(reversed(models)))
        axis.set_ylim(-0.6, len(models) - 0.4)
        axis.set_title(task, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel("avg@k, % (bar: 95 % interval)", fontsize=10)
    with whole_file(file) as stream:
        figure.savefig(stream, format="png", dpi=150)
