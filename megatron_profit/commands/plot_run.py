"""Draw the curves of one or more training runs, from their metrics files or TensorBoard folders.

    megatron-profit plot --out curves.png base=runs/base ProFit=runs/profit/tensorboard …

A run is a metrics file, a folder with one (`metrics.jsonl`, as in --save), or a folder with TensorBoard
events. Without a label it is called after its folder.

There is a panel for each group of metrics that any of the runs has: losses, kept fraction, probabilities,
gradient norm, learning rate, throughput. The figure appears whole or not at all.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from checkpoint_conversion.cli import FlagHelp
from checkpoint_conversion.engine.output import whole_file
from megatron_profit.training.monitoring.metrics_file import read_metrics

Curve = tuple[list[int], list[float]]

PANELS = (
    (
        "Loss per token (nats)",
        {
            "lm loss": "cross-entropy",
            "objective": "objective",
            "lm loss validation": "cross-entropy, validation",
        },
    ),
    ("Kept fraction", {"kept fraction": "kept"}),
    (
        "Mean probability of the target",
        {
            "mean p kept": "kept",
            "mean p dropped": "dropped",
            "mean q kept": "kept, under the reference",
        },
    ),
    ("Gradient norm", {"grad-norm": "gradient norm"}),
    ("Learning rate", {"learning-rate": "learning rate"}),
    ("Supervised tokens per second", {"supervised tokens per second": "supervised"}),
)
_COLUMNS = 3
# Groups of curves in TensorBoard.
_GROUPS = ("train", "validation", "speed", "tokens")
# Entries of a run's folder.
METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
# Names in the metrics file that differ from Megatron's names in TensorBoard.
_RENAMED = {"grad norm": "grad-norm", "learning rate": "learning-rate", "loss scale": "loss-scale"}
# Colour-blind safe, from Okabe and Ito.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
STYLES = ("-", "--", ":")


def read_curves(run: Path) -> dict[str, Curve]:
    """Return metrics by their TensorBoard names, each as steps and values.

    A step that was logged twice keeps the last values. An evaluation's metric has "validation" after its
    name.

    Args:
        run: A metrics file of JSON lines, or a folder with one or with TensorBoard events.

    Raises:
        FileNotFoundError: It is neither.
        ValueError: A line of a metrics file is broken.
    """
    values: dict[str, dict[int, float]] = {}
    for name, step, value in _points(run):
        values.setdefault(name, {})[step] = value
    return {
        name: (sorted(points), [points[step] for step in sorted(points)])
        for name, points in values.items()
    }


def _points(run: Path) -> Iterator[tuple[str, int, float]]:
    if run.is_file():
        return _points_of_file(run)
    if (run / METRICS).is_file():
        return _points_of_file(run / METRICS)
    for folder in (run, run / TENSORBOARD):
        if any(folder.glob("events.out.tfevents.*")):
            return _points_of_events(folder)
    raise FileNotFoundError(
        f"{run} is no metrics file, and no folder with {METRICS} or a TensorBoard event file in it"
    )


def _points_of_events(folder: Path) -> Iterator[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            yield _ungrouped(name), event.step, event.value


def _ungrouped(curve: str) -> str:
    """Return a curve's name without its group. For example, "lm loss validation" of "validation/lm loss"."""
    group, slash, name = curve.partition("/")
    if not slash or group not in _GROUPS:
        return curve
    return f"{name} validation" if group == "validation" else name


def _points_of_file(file: Path) -> Iterator[tuple[str, int, float]]:
    endings = {"train": "", "evaluation": " validation"}
    for record in read_metrics(file):
        if record["kind"] in endings:
            for name in record.keys() - {"kind", "step"}:
                if isinstance(record[name], int | float):
                    tag = _RENAMED.get(name, name) + endings[record["kind"]]
                    yield tag, record["step"], record[name]


def plot_runs(runs: Mapping[str, Path], out: Path) -> Path:
    """Draw the runs into one PNG.

    Args:
        runs: Label -> metrics file or folder, see `read_curves`.
        out: The file to write.

    Raises:
        FileNotFoundError, ValueError: See `read_curves`; and when a run holds none of the metrics.
    """
    from matplotlib.figure import Figure

    curves = {label: _telling(read_curves(run)) for label, run in runs.items()}
    panels = [
        (title, names)
        for title, names in PANELS
        if any(name in found for found in curves.values() for name in names)
    ]
    if not panels:
        raise ValueError(f"{', '.join(map(str, runs.values()))}: none of the metrics to draw")
    columns, rows = min(len(panels), _COLUMNS), -(-len(panels) // _COLUMNS)
    size = (13 * columns / _COLUMNS, 3.8 * rows)
    figure = Figure(figsize=size, layout="constrained")
    figure.subplots(rows, columns)
    for axis, (title, names) in zip(figure.axes, panels, strict=False):
        for (label, found), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
            for (name, short), style in zip(names.items(), STYLES, strict=False):
                if name in found:
                    text = f"{label}: {short}" if len(names) > 1 else label
                    axis.plot(*found[name], style, color=colour, label=text, linewidth=1.4)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        axis.legend(fontsize=8)
    for axis in figure.axes[len(panels) :]:
        axis.remove()
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as stream:
        figure.savefig(stream, format="png", dpi=130)
    return out


def _telling(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Leave out an objective that is the cross-entropy, as plain SFT's, and the probability of no token."""
    kept, objective, loss = (
        curves.get(name, ([], []))[1] for name in ("kept fraction", "objective", "lm loss")
    )
    silent = ["mean p dropped"] if set(kept) == {1.0} else []
    # The two are summed in another order.
    if len(objective) == len(loss) and all(
        math.isclose(one, other, rel_tol=1e-4) for one, other in zip(objective, loss, strict=True)
    ):
        silent.append("objective")
    return {name: curve for name, curve in curves.items() if name not in silent}


def labelled(run: str) -> tuple[str, str]:
    """Return the label and the path of an argument LABEL=RUN or RUN.

    RUN alone is named after its folder. For example, runs/profit/tensorboard gives "profit".
    """
    label, equals, path = run.partition("=")
    if equals and not Path(run).exists():  # a path may hold a "="
        return label, path
    place = Path(run).resolve()
    if place.is_file() or place.name == TENSORBOARD:
        place = place.parent
    return place.name, run


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the curves of the runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=FlagHelp)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[LABEL=]RUN",
        help=f"a metrics file, a folder with {METRICS} (--save of a run), or one with TensorBoard events",
    )
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args(argv)
    runs = {}
    for run in arguments.runs:
        label, path = labelled(run)
        if not (label and path):
            parser.error(f"{run!r} is not of the form LABEL=RUN")
        if label in runs:
            parser.error(
                f"the label {label!r} is given twice; write LABEL=RUN with another for each"
            )
        runs[label] = Path(path)
    try:
        print(f"wrote {plot_runs(runs, arguments.out)}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
