"""The numerical guards of a run: they find steps with a fault and say how the run reacts.

This module is pure: `Guards` gets the facts of a step and answers with events. `run_monitor.py` collects the
facts, the same on all ranks, and carries out the reactions.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

# Megatron's exit code for a run that failed on the validation of a result.
EXIT_CODE = 17
POLICIES = ("warn", "skip", "stop")
_CHOICES = {
    "on_nonfinite": ("skip", "stop"),
    "on_spike": POLICIES,
    "on_empty": POLICIES,
    "on_stall": ("warn", "stop"),
}


@dataclass(frozen=True)
class GuardOptions:
    """The reaction to a faulty step: warn, skip it (no optimizer step) or stop the run before its update.

    Attributes:
        on_nonfinite: NaN or infinity in the loss or the gradient.
        on_spike: A loss or gradient norm far above the recent steps' values.
        on_empty: No supervised token in the global batch.
        on_stall: `stall_steps` steps in a row trained no token: none was kept, or the optimizer took no step.
        spike_grad_norm, spike_loss: Multiple of the median of recent steps that is a spike; 0 for none. For
            example, with 10 a gradient norm of 21 is a spike after a median of 2.
        stall_steps: More than the 32 halvings that bring Megatron's first fp16 loss scale down to 1.

    Raises:
        ValueError: Names the flag, its value and the limit.
    """

    on_nonfinite: str = "stop"
    on_spike: str = "warn"
    on_empty: str = "skip"
    on_stall: str = "warn"
    spike_grad_norm: float = 10.0
    spike_loss: float = 3.0
    stall_steps: int = 50

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{_flag(name)} is {getattr(self, name)!r}; choose one of {', '.join(choices)}"
                )
        for name in ("spike_grad_norm", "spike_loss"):
            factor = getattr(self, name)
            if not (factor == 0 or 1 < factor < math.inf):
                raise ValueError(
                    f"{_flag(name)} is {factor}; it must be a multiple above 1 of the recent median, or 0 "
                    "for no such check"
                )
        if self.stall_steps < 1:
            raise ValueError(f"--stall-steps is {self.stall_steps}; it must be at least 1")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> GuardOptions:
        """Return the options from arguments by name."""
        return cls(**{option.name: settings[option.name] for option in fields(cls)})


def add_guard_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of `GuardOptions`."""
    helps = {
        "on_nonfinite": "What to do about NaN or infinity in loss or gradient: skip the optimizer step, or "
        "stop the run before it. An overflow of fp16 loss scaling is no such event.",
        "on_spike": "What to do about a spike of loss or gradient norm.",
        "on_empty": "What to do about a global batch without a supervised token.",
        "on_stall": "What to do when nothing was trained for --stall-steps steps in a row.",
        "spike_grad_norm": "A gradient norm of this many times the median of recent steps is a spike; 0 for "
        "none.",
        "spike_loss": "A cross-entropy of this many times the median of recent steps is a spike; 0 for none.",
        "stall_steps": "Steps in a row that keep no token or take no optimizer step.",
    }
    for option in fields(GuardOptions):
        kind = type(option.default)
        group.add_argument(
            _flag(option.name),
            type=kind,
            default=option.default,
            choices=_CHOICES.get(option.name),
            metavar=None if kind is str else "N",
            help=helps[option.name],
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class StepFacts:
    """The facts of a step that the guards judge, the same on all ranks.

    Attributes:
        loss: Cross-entropy of the supervised tokens; meaningless where it is not finite.
        finite_loss: Whether the loss of every micro-batch is finite.
        supervised, kept: Numbers of tokens.
        grad_norm: None where the fp16 loss scaler found an overflow, so that there is no norm.
        rejected_fatal, rejected: Whether a check of Megatron's found a NaN, or a large value, on any rank.
    """

    loss: float
    finite_loss: bool
    supervised: float
    kept: float
    grad_norm: float | None
    rejected_fatal: bool = False
    rejected: bool = False


@dataclass(frozen=True)
class Event:
    """A fault of a step.

    Attributes:
        kind: "non-finite loss", "non-finite gradient", "spike", "empty batch" or "stall".
        policy: The reaction: warn, skip or stop.
        text: A description of the fault.
    """

    kind: str
    policy: str
    text: str


class Spikes:
    """Compares a value with the median of the last ones.

    All values enter the window, spikes too: a few do not move a median, and values that stay high are no
    spikes.

    Args:
        factor: Multiple of the median that is a spike; 0 for none.
        window: Number of values to remember.
        least: Number of values that must be known before any is judged.
    """

    def __init__(self, factor: float, window: int = 64, least: int = 16) -> None:
        self._factor, self._least = factor, least
        self.recent: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> float | None:
        """Remember a value.

        Returns:
            The median of the earlier values if the value is a spike, else None.
        """
        if not (math.isfinite(value) and value > 0):
            return None
        middle = median(self.recent) if len(self.recent) >= self._least else math.inf
        self.recent.append(value)
        return middle if self._factor and value > self._factor * middle else None


@dataclass
class Guards:
    """Judges the steps of a run, one after the other."""

    options: GuardOptions
    _losses: Spikes = field(init=False)
    _grad_norms: Spikes = field(init=False)
    _idle_steps: int = 0

    def __post_init__(self) -> None:
        self._losses = Spikes(self.options.spike_loss)
        self._grad_norms = Spikes(self.options.spike_grad_norm)

    def judge(self, facts: StepFacts) -> list[Event]:
        """Return the faults of a step that has its gradient, before its update."""
        policy = self.options.on_nonfinite
        if not facts.finite_loss:
            return [Event("non-finite loss", policy, "the loss is NaN or infinite")]
        norm = facts.grad_norm
        if facts.rejected_fatal or (norm is not None and not math.isfinite(norm)):
            return [Event("non-finite gradient", policy, "the gradient holds NaN or infinity")]
        if facts.supervised == 0:
            text = "the global batch has no supervised token"
            return [Event("empty batch", self.options.on_empty, text)]
        texts = [
            f"the {what} is {value:.4g}, {value / middle:.3g} times the median {middle:.4g} of recent steps"
            for what, value, spikes in (
                ("cross-entropy", facts.loss, self._losses),
                ("gradient norm", 0.0 if norm is None else norm, self._grad_norms),
            )
            if (middle := spikes.add(value)) is not None
        ]
        if facts.rejected:
            texts.append("Megatron's check rejected an unexpectedly large value")
        return [Event("spike", self.options.on_spike, text) for text in texts]

    def finish(self, facts: StepFacts, *, updated: bool) -> list[Event]:
        """Return the faults of the steps so far, this one included."""
        self._idle_steps = 0 if updated and facts.kept else self._idle_steps + 1
        if self._idle_steps == 0 or self._idle_steps % self.options.stall_steps:
            return []
        text = f"nothing was trained for {self._idle_steps} steps in a row: " + (
            "the objective keeps no token"
            if updated
            else "the optimizer takes no step (fp16 overflow, or skipped by a guard)"
        )
        return [Event("stall", self.options.on_stall, text)]
