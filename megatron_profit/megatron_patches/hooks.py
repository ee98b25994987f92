"""What a run does beside Megatron's own loop, at the places where Megatron offers no hook.

The patches of `megatron.py` that announce something call the listeners of the process, which prepare what a
step needs and look after checkpoints. Those of `observation.py` call its one observer, which sees what a
step yields, and whoever wants to know the metrics of evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class RunFailure(RuntimeError):
    """The run has to end, for a reason that its message tells in full."""


@dataclass(frozen=True)
class Trained:
    """What Megatron's loop holds when it calls.

    Attributes:
        model: The model chunks of this rank, as the schedules take them.
        config: Megatron's configuration of the model.
        optimizer: None where the loop has none at hand, as in an evaluation.
    """

    model: list[Any]
    config: Any
    optimizer: Any = None


class RunListener(Protocol):
    """Called on every rank, so each method may run collectives. A subclass overrides what it needs."""

    def before_training(self, iteration: int) -> None:
        """Before the first step of this process, with the checkpoint of `iteration` loaded, if any."""

    def before_train_step(self, trained: Trained, iteration: int) -> None:
        """Before the optimizer step that turns `iteration` into `iteration + 1`."""

    def before_evaluation(self, trained: Trained) -> None:
        """Before the iterations of one evaluation."""

    def before_checkpoint(self, folder: Path, iteration: int, size: int) -> None:
        """Before anything is written to `folder`; all ranks wait until the last has returned. The tensors of
        all ranks take `size` bytes."""

    def with_checkpoint(self, folder: Path, iteration: int) -> None:
        """Write beside the checkpoint of `iteration`, which is whole only after all ranks have returned."""

    def after_checkpoint(self, iteration: int) -> None:
        """After Megatron has called the checkpoint of `iteration` the latest."""


_listeners: tuple[RunListener, ...] = ()


def listen(*listeners: RunListener) -> None:
    """Make these the ones that the patches call, in this order."""
    global _listeners
    _listeners = listeners


def listeners() -> tuple[RunListener, ...]:
    """Whom the patches call."""
    return _listeners


@dataclass(frozen=True)
class LoggedStep:
    """What Megatron's loop knows of a step when it logs.

    Attributes:
        iteration: Steps that are done, this one included.
        skipped: Whether the optimizer took no step.
        values: What goes with the step itself: learning rate, loss scale, gradient norm (absent where the
            loss scaler found none) and so on, by Megatron's names.
        tokens: Of records, over all ranks.
        floating_point_operations: Of the step over all ranks, by Megatron's count.
        line: The values of Megatron's console line by name, where it is due; else None.
    """

    iteration: int
    skipped: bool
    values: Mapping[str, float]
    tokens: float
    floating_point_operations: float
    line: Mapping[str, float] | None


class RunObserver(Protocol):
    """Sees what each training step yields. Called on every rank, so each method may run collectives."""

    def reduce_losses(self, losses: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Behind the forward and backward passes of a step.

        Args:
            losses: What the loss function reported of each micro-batch; [] off the last pipeline stage.

        Returns:
            What Megatron sees in their place.
        """

    def rejected(self, message: str, fatal: bool) -> None:
        """A check of Megatron (`validate_result`) rejected a loss or gradient of this rank."""

    def allows_update(self, grad_norm: float) -> bool:
        """Return whether the optimizer may step, given the norm of the gradient; alike on all ranks."""

    def exit_code(self, skipped: bool) -> int | None:
        """Behind a step: with which code the run has to end now, or None; alike on all ranks."""

    def scalars(self, iteration: int, skipped: bool) -> dict[str, Any]:
        """Behind a step: the losses that Megatron writes to TensorBoard and W&B."""

    def log(self, step: LoggedStep) -> None:
        """Behind a step, when Megatron logs."""


EvaluationListener = Callable[[int, Mapping[str, float]], None]

_observer: RunObserver | None = None
_evaluation_listeners: list[EvaluationListener] = []


def observe(observer: RunObserver | None) -> None:
    """Make `observer` the one that sees the steps; None for nobody."""
    global _observer
    _observer = observer


def observer() -> RunObserver | None:
    """Who sees the steps."""
    return _observer


def on_evaluation(listener: EvaluationListener) -> None:
    """Call `listener(iteration, metrics)` behind each evaluation, on every rank.

    `metrics` holds the value of each metric of the validation data by name, such as "lm loss", as a sum over
    a count; it is the same on all ranks. `iteration` are the steps that the evaluated weights have had.
    """
    _evaluation_listeners.append(listener)


def evaluation_listeners() -> tuple[EvaluationListener, ...]:
    """Whom an evaluation is told."""
    return tuple(_evaluation_listeners)
