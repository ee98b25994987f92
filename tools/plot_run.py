"""Draw the curves of one or more training runs from their TensorBoard folders.

    python tools/plot_run.py --out curves.png base=runs/quickstart/base/tensorboard …

The panels are the losses (objective and plain cross-entropy), the kept fraction, and the mean probability
of kept and dropped tokens. The figure is written beside its place and renamed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = tuple[list[int], list[float]]

PANELS = (
    ("Loss per token (nats)", {"lm loss": "cross-entropy", "objective": "objective"}),
    ("Kept fraction", {"kept fraction": "kept"}),
    ("Mean probability of the target", {"mean p kept": "kept", "mean p dropped": "dropped"}),
)
# Colour-blind safe, from Okabe and Ito.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
STYLES = ("-", "--")


def read_curves(folder: Path) -> dict[str, Curve]:
    """Scalars by name, each as steps and values; a step that was logged twice keeps the last value.

    Raises:
        FileNotFoundError: The folder holds no TensorBoard event file.
    """
    if not any(folder.glob("events.out.tfevents.*")):
        raise FileNotFoundError(f"{folder} holds no TensorBoard event file")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    curves = {}
    for name in events.Tags()["scalars"]:
        values = {event.step: event.value for event in events.Scalars(name)}
        curves[name] = (sorted(values), [values[step] for step in sorted(values)])
    return curves


def plot_runs(runs: Mapping[str, Path], out: Path) -> Path:
    """Draw the runs into one PNG.

    Args:
        runs: Label -> TensorBoard folder.
        out: The file to write.
    """
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 3.8), layout="constrained")
    for (label, folder), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
        curves = _telling(read_curves(folder))
        for axis, (title, names) in zip(axes, PANELS, strict=True):
            for (name, short), style in zip(names.items(), STYLES, strict=False):
                if name in curves:
                    text = f"{label}: {short}" if len(names) > 1 else label
                    axis.plot(*curves[name], style, color=colour, label=text, linewidth=1.4)
            axis.set(title=title, xlabel="step")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        if axis.lines:
            axis.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.partial")
    figure.savefig(beside, format="png", dpi=130)
    plt.close(figure)
    os.replace(beside, out)
    return out


def _telling(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Without the curves that say nothing in a run that keeps every token, as plain SFT does."""
    keeps_all = set(curves.get("kept fraction", ([], []))[1]) == {1.0}
    silent = ("objective", "mean p dropped") if keeps_all else ()
    return {name: curve for name, curve in curves.items() if name not in silent}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER", help="TensorBoard folders")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args(argv)
    runs = {}
    for run in arguments.runs:
        label, _, folder = run.partition("=")
        if not (label and folder):
            parser.error(f"{run!r} is not of the form LABEL=FOLDER")
        if label in runs:
            parser.error(f"the label {label!r} is given twice; each run needs its own")
        runs[label] = Path(folder)
    try:
        print(f"wrote {plot_runs(runs, arguments.out)}")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
