"""What a run does beside Megatron's own loop, at the three places where Megatron offers no hook.

The patches `before-train-step`, `before-evaluation` and `with-checkpoint` call the one listener of the
process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


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
    """Called on every rank, so each method may run collectives."""

    def before_train_step(self, trained: Trained, iteration: int) -> None:
        """Before the optimizer step that turns `iteration` into `iteration + 1`."""

    def before_evaluation(self, trained: Trained) -> None:
        """Before the iterations of one evaluation."""

    def with_checkpoint(self, folder: Path, iteration: int) -> None:
        """While the checkpoint of `iteration` is written to `folder`, before Megatron calls it the latest."""


_listener: RunListener | None = None


def listen(listener: RunListener | None) -> None:
    """Make `listener` the one that the patches call; None for nobody."""
    global _listener
    _listener = listener


def listener() -> RunListener | None:
    """Whom the patches call."""
    return _listener
