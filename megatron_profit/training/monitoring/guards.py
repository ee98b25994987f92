"""The numerical guards of a run: they find steps with a fault and say how the run reacts.

This module is pure: `Guards` gets the facts of a step and answers with events. `run_monitor.py` collects the
facts, the same on all ranks, and carries out the reactions.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, fields
from statistics import median

from megatron_profit.flags import ArgumentsError, flag, flag_of

# Megatron's exit code for a run that failed on the validation of a result.
EXIT_CODE = 17
POLICIES = ("warn", "skip", "stop")


@dataclass(frozen=True)
class GuardOptions:
    """The reaction to a faulty step: warn, skip it (no optimizer step) or stop the run before its update.

    For example, with `spike_grad_norm` 10 a gradient norm of 21 is a spike after a median of 2. By default
    `stall_steps` is more than the 32 halvings that bring Megatron's first fp16 loss scale down to 1.

    Raises:
        ArgumentsError: Names the flag, its value and the limit.
    """

    on_nonfinite: str = flag(
        "What to do about NaN or infinity in loss or gradient: skip the optimizer step, or stop the run "
        "before it. An overflow of fp16 loss scaling is no such event.",
        default="stop",
        choices=("skip", "stop"),
    )
    on_spike: str = flag(
        "What to do about a spike of loss or gradient norm.", default="warn", choices=POLICIES
    )
    on_empty: str = flag(
        "What to do about a global batch without a supervised token.",
        default="skip",
        choices=POLICIES,
    )
    on_stall: str = flag(
        "What to do when nothing was trained for --stall-steps steps in a row.",
        default="warn",
        choices=("warn", "stop"),
    )
    spike_grad_norm: float = flag(
        "A gradient norm of this many times the median of recent steps is a spike; 0 for none.",
        default=10.0,
        type=float,
        metavar="N",
    )
    spike_loss: float = flag(
        "A cross-entropy of this many times the median of recent steps is a spike; 0 for none.",
        default=3.0,
        type=float,
        metavar="N",
    )
    stall_steps: int = flag(
        "Steps in a row that keep no token or take no optimizer step.",
        default=50,
        type=int,
        metavar="N",
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value, choices = getattr(self, option.name), option.metadata.get("choices")
            if choices and value not in choices:
                raise ArgumentsError(
                    f"{flag_of(option.name)} is {value!r}; choose one of {', '.join(choices)}"
                )
        for name in ("spike_grad_norm", "spike_loss"):
            factor = getattr(self, name)
            if not (factor == 0 or 1 < factor < math.inf):
                raise ArgumentsError(
                    f"{flag_of(name)} is {factor}; it must be a multiple above 1 of the recent median, or "
                    "0 for no such check"
                )
        if self.stall_steps < 1:
            raise ArgumentsError(f"--stall-steps is {self.stall_steps}; it must be at least 1")


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
