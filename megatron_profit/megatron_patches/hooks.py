"""Hooks of a run in Megatron's own loop, at the places where Megatron offers none.

The patches of `megatron.py` that announce an event call the listeners of the process. These prepare the data
of a step and look after checkpoints. The patches of `observation.py` call the process's one observer, which
sees the results of a step, and the listeners of evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class RunFailure(RuntimeError):
    """The run has to end; the message gives the full reason."""


@dataclass(frozen=True)
class Trained:
    """The objects that Megatron's loop passes when it calls.

    Attributes:
        model: The model chunks of this rank, as the schedules take them.
        config: Megatron's configuration of the model.
        optimizer: None where the loop has none at hand, as in an evaluation.
    """

    model: list[Any]
    config: Any
    optimizer: Any = None


class RunListener(Protocol):
    """Methods that the loop calls on every rank, so each may run collectives. Subclasses override some of
    them.
    """

    def before_training(self, iteration: int) -> None:
        """Called before the first step of this process, after the checkpoint of `iteration` was loaded, if
        any.
        """

    def before_train_step(self, trained: Trained, iteration: int) -> None:
        """Called before the optimizer step that turns `iteration` into `iteration + 1`."""

    def before_evaluation(self, trained: Trained) -> None:
        """Called before the iterations of one evaluation."""

    def before_checkpoint(self, folder: Path, iteration: int, size: int) -> None:
        """Called before any file is written to `folder`; all ranks wait until the last has returned.

        The tensors of all ranks take `size` bytes.
        """

    def with_checkpoint(self, folder: Path, iteration: int) -> None:
        """Write files into the checkpoint of `iteration`, which is complete only after all ranks have
        returned.
        """

    def after_checkpoint(self, iteration: int) -> None:
        """Called after Megatron has called the checkpoint of `iteration` the latest."""


_listeners: tuple[RunListener, ...] = ()


def listen(*listeners: RunListener) -> None:
    """Register these listeners, and no others; the patches call them in this order."""
    global _listeners
    _listeners = listeners


def listeners() -> tuple[RunListener, ...]:
    """Return the registered listeners."""
    return _listeners


@dataclass(frozen=True)
class LoggedStep:
    """The facts of a step that Megatron's loop has when it logs.

    Attributes:
        iteration: Steps that are done, this one included.
        skipped: Whether the optimizer took no step.
        values: Values of the step itself: learning rate, loss scale, gradient norm (absent where the
            loss scaler found none) and so on, by Megatron's names.
        tokens: Tokens of records, over all ranks.
        floating_point_operations: The step's operations over all ranks, by Megatron's count.
        line: The values of Megatron's console line by name, if the line is due; else None.
    """

    iteration: int
    skipped: bool
    values: Mapping[str, float]
    tokens: float
    floating_point_operations: float
    line: Mapping[str, float] | None


class RunObserver(Protocol):
    """Sees the results of each training step. Called on every rank, so each method may run collectives."""

    def reduce_losses(self, losses: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the losses that Megatron sees, after the forward and backward passes of a step.

        Args:
            losses: The loss function's report for each micro-batch; [] on all but the last pipeline stage.

        Returns:
            The losses for Megatron in their place.
        """

    def rejected(self, message: str, fatal: bool) -> None:
        """Called when a check of Megatron (`validate_result`) rejects a loss or gradient of this rank."""

    def allows_update(self, grad_norm: float) -> bool:
        """Return whether the optimizer may step, given the norm of the gradient; the same on all ranks."""

    def exit_code(self, skipped: bool) -> int | None:
        """Return the code with which the run has to end after a step, or None; the same on all ranks."""

    def scalars(self, iteration: int, skipped: bool) -> dict[str, Any]:
        """Return the losses that Megatron writes to TensorBoard and W&B after a step."""

    def log(self, step: LoggedStep) -> None:
        """Called after a step, when Megatron logs."""


EvaluationListener = Callable[[int, Mapping[str, float]], None]

_observer: RunObserver | None = None
_evaluation_listeners: list[EvaluationListener] = []


def observe(observer: RunObserver | None) -> None:
    """Make `observer` the one that sees the steps; None for none."""
    global _observer
    _observer = observer


def observer() -> RunObserver | None:
    """Return the registered observer."""
    return _observer


def on_evaluation(listener: EvaluationListener) -> None:
    """Call `listener(iteration, metrics)` after each evaluation, on every rank.

    `metrics` holds the value of each metric of the validation data by name, for example "lm loss", as a sum
    over a count. It is the same on all ranks. `iteration` is the number of steps that the evaluated weights
    have made.
    """
    _evaluation_listeners.append(listener)


def evaluation_listeners() -> tuple[EvaluationListener, ...]:
    """Return the listeners of evaluations."""
    return tuple(_evaluation_listeners)
