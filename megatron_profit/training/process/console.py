"""Messages of a run before Megatron has set up its process group, and the line of its steps."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from checkpoint_conversion.errors import printable, warn
from megatron_profit.megatron_patches.callbacks import LoggedStep
from megatron_profit.training.process.quiet import quiet_console
from megatron_profit.training.process.ranks import is_first_rank

# Values of a quiet run's line, with their names there.
_SHORT = {
    "objective": "objective",
    "lm loss": "loss",
    "grad norm": "gradient",
    "learning rate": "lr",
}
# Time after which torchrun has ended this process, if the machine's first process met the same error.
_PATIENCE_SECONDS = 30


def print_rank_0(message: str) -> None:
    """Print on the first process only.

    Characters that a terminal would obey, as in a file's name, are printed as escapes.
    """
    if is_first_rank():
        print(lines_to_print(message), flush=True)


def warn_rank_0(message: object) -> None:
    """Print a warning on the first process only."""
    if is_first_rank():
        warn(message)


def lines_to_print(message: object) -> str:
    """Return a message of several lines, each safe to print."""
    return "\n".join(map(printable, str(message).split("\n")))


def fail(message: object) -> NoReturn:
    """End the run with one message and the exit code 2.

    The first process of each machine prints it at once. The others wait: torchrun ends all processes as soon
    as one has ended, which might be before the first one has printed.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_PATIENCE_SECONDS)
    print(f"megatron-profit-sft: error: {lines_to_print(message)}", file=sys.stderr, flush=True)
    sys.exit(2)


@dataclass(frozen=True)
class StepReport:
    """An interval of steps, as the console tells of it.

    Attributes:
        step: The last step of the interval.
        train_iters: Steps of the run.
        metrics: Metrics of the interval.
        speed: `run_monitor.throughput`, and the peak memory in GiB.
        seconds: Seconds of a step.
    """

    step: LoggedStep
    train_iters: int
    metrics: Mapping[str, float]
    speed: Mapping[str, float]
    seconds: float

    def line(self) -> str:
        """Return one line: the metrics, then learning rate and gradient norm, then speed.

        It begins like Megatron's and has its form, `| name: value |`, so that what reads one reads both.
        """
        values, speed = {**self.metrics, **self.step.values}, self.speed
        if values.get("loss scale") == 1:
            del values["loss scale"]
        return " | ".join(
            (
                f" iteration {self.step.iteration:8}/{self.train_iters:8}",
                *(f"{name}: {_shown(value)}" for name, value in values.items()),
                *(["no optimizer step"] if self.step.skipped else []),
                f"tokens/s: {speed['tokens per second']:,.0f} "
                f"({speed['supervised tokens per second']:,.0f} supervised, "
                f"{speed['kept tokens per second']:,.0f} kept)",
                f"TFLOP/s/GPU: {speed['model TFLOP/s per GPU']:.4G}",
                f"peak memory: {speed['peak memory GiB']:.1f} GiB",
                f"elapsed time per iteration (ms): {1000 * self.seconds:.1f}",
                f"left: {self._left} |",
            )
        )

    def short_line(self) -> str:
        """Return the line of a quiet run. The time that is left comes early, so that a narrow terminal shows
        it.
        """
        values = {**self.metrics, **self.step.values}
        parts = [f"step {self.step.iteration}/{self.train_iters}  left {self._left}"]
        parts += [f"{name} {values[key]:.4g}" for key, name in _SHORT.items() if key in values]
        if "kept fraction" in values:
            parts.append(f"kept {values['kept fraction']:.0%}")
        parts += ["no optimizer step"] if self.step.skipped else []
        parts.append(f"{self.speed['tokens per second']:,.0f} tokens/s")
        parts.append(f"{self.speed['peak memory GiB']:.1f} GiB")
        return "  ".join(parts)

    @property
    def _left(self) -> datetime.timedelta:
        """Time until the end of the run, if its steps go on like these."""
        steps = self.train_iters - self.step.iteration
        return datetime.timedelta(seconds=round(steps * self.seconds))


def print_step(report: StepReport) -> None:
    """Print the line of an interval of steps."""
    quiet = quiet_console()
    if quiet is None:
        print(report.line(), flush=True)
    else:
        quiet.show_live(report.short_line())


def print_evaluation(iteration: int, metrics: Mapping[str, float]) -> None:
    """Print the line of an evaluation in a quiet run; in another one Megatron's is printed."""
    if quiet_console() is not None:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"validation after step {iteration}  {shown}", flush=True)


def _shown(value: float) -> str:
    """Return a count with all its digits, another number with seven."""
    return str(value) if isinstance(value, int) else f"{value:.7G}"
