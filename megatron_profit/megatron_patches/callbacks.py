"""The one way in which a part of a run listens to Megatron's loop.

Megatron offers no hook at these places. The patches of this package call the registered callbacks, in their
order. Without callbacks Megatron does what it always does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class RunFailure(RuntimeError):
    """The run has to end, for a reason that its message tells in full."""


@dataclass(frozen=True)
class TrainContext:
    """The objects that Megatron's loop holds when it calls.

    Attributes:
        model: The model chunks of this rank, as the schedules take them.
        config: Megatron's configuration of the model.
        optimizer: None where the loop has none at hand, for example in an evaluation.
    """

    model: list[Any]
    config: Any
    optimizer: Any = None


@dataclass(frozen=True)
class LoggedStep:
    """The values that Megatron's loop has when it logs a step.

    Attributes:
        iteration: Steps that are done, this one included.
        skipped: Whether the optimizer took no step.
        values: Values of the step itself by Megatron's names: learning rate, loss scale, gradient norm
            (absent where the loss scaler found none) and so on.
        tokens: Tokens of records, over all ranks.
        floating_point_operations: Of the step over all ranks, by Megatron's count.
        module_losses: Losses of the step that the model's modules add by themselves, for example the
            balancing losses of experts: tensors [] by name.
        seconds: Seconds of the steps since the last line but the first step's, where a line is due; else
            None.
    """

    iteration: int
    skipped: bool
    values: Mapping[str, float]
    tokens: float
    floating_point_operations: float
    module_losses: Mapping[str, Any]
    seconds: float | None


class Callback:
    """A part of a run. A subclass overrides the methods that it needs; by default none of them acts.

    Every rank calls each method, so a method may run collectives.
    """

    def before_training(self, iteration: int) -> None:
        """Act before the first step of this process, with the checkpoint of `iteration` loaded, if any."""

    def before_train_step(self, context: TrainContext, iteration: int) -> None:
        """Act before the optimizer step that turns `iteration` into `iteration + 1`."""

    def reduce_losses(self, losses: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Act after the forward and backward passes of a step.

        Args:
            losses: The reports of the loss function, one for each micro-batch; [] off the last pipeline
                stage.

        Returns:
            The reports that Megatron sees in their place.
        """
        return losses

    def rejected(self, message: str, fatal: bool) -> bool:
        """Act on a loss or gradient of this rank that Megatron's `validate_result` rejects.

        Returns:
            Whether this callback takes care of it; if none does, Megatron raises an error.
        """
        return False

    def allows_update(self, grad_norm: float) -> bool:
        """Return whether the optimizer may step, given the norm of the gradient; alike on all ranks."""
        return True

    def exit_code(self, skipped: bool) -> int | None:
        """Return, after a step, the code with which the run has to end now, or None; alike on all ranks."""
        return None

    def scalars(self, iteration: int, skipped: bool) -> dict[str, Any] | None:
        """Return, after a step, the losses for TensorBoard and W&B; None to leave Megatron's."""
        return None

    def log(self, step: LoggedStep) -> None:
        """Act after every step; `step.seconds` is None where no line is due."""

    def before_evaluation(self, context: TrainContext) -> None:
        """Act before the iterations of one evaluation."""

    def evaluation_metrics(self, iteration: int) -> Mapping[str, float]:
        """Return further metrics of the weights that an evaluation has just judged, alike on all ranks.

        Args:
            iteration: Steps that the weights have had.
        """
        return {}

    def after_evaluation(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Act after an evaluation.

        Args:
            iteration: Steps that the evaluated weights have had.
            metrics: The value of each metric by name, the same on all ranks: of the validation data, for
                example "lm loss", a sum over a count, and `evaluation_metrics`.
        """

    def before_checkpoint(self, folder: Path, iteration: int, size: int) -> None:
        """Act before anything is written to `folder`; all ranks wait until the last has returned.

        Args:
            folder: The folder of the checkpoint.
            iteration: Steps that the weights have had.
            size: Bytes of the tensors of all ranks.
        """

    def with_checkpoint(self, folder: Path, iteration: int) -> None:
        """Write next to the checkpoint of `iteration`, which is whole only after all ranks have returned."""

    def after_checkpoint(self, iteration: int) -> None:
        """Act after Megatron has called the checkpoint of `iteration` the latest."""


_callbacks: tuple[Callback, ...] = ()


def register(*registered: Callback) -> None:
    """Let the patches call these, in this order, and no others."""
    global _callbacks
    _callbacks = registered


def callbacks() -> tuple[Callback, ...]:
    """Return the registered callbacks."""
    return _callbacks
