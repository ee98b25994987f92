"""The size of a checkpoint, counted from the flags, and the time that writing it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from checkpoint_conversion.progress import duration, human

# Assumed of a shared file system that all ranks write to together.
BYTES_A_SECOND = 1e9
# Values that an optimizer keeps for each parameter, besides the parameter itself.
_MOMENTS = {"adam": 2, "sgd": 1, "lion": 1}


def checkpoint_bytes(settings: Mapping[str, Any], parameters: int) -> int:
    """Return the bytes of a checkpoint: the weights and the state of the optimizer, over all ranks.

    For example, in bf16 with Adam a parameter takes 2 + 4 + 8 bytes.

    Args:
        settings: Arguments by name: precision, optimizer, and what is left out.
        parameters: Number of the whole model's parameters, or of its adapters if they alone are saved.
    """
    half = settings.get("bf16") or settings.get("fp16")
    weights = 2 if half else 4
    if settings.get("no_save_optim"):
        return weights * parameters
    # The distributed optimizer keeps the parameters in its state, others only fp32 copies of bf16 and fp16.
    copies = 4 if half or settings.get("use_distributed_optimizer") else 0
    moments = _MOMENTS.get(settings.get("optimizer") or "adam", 2)
    return (weights + copies + 4 * moments) * parameters


def save_seconds(nbytes: int) -> float:
    """Return the seconds that writing a checkpoint takes, at the assumed speed of the file system."""
    return nbytes / BYTES_A_SECOND


def seconds_to_end(nbytes: int) -> int:
    """Return the seconds that a run gets from a signal to its end: a step or an evaluation, then a save.

    A file system may be half as fast as assumed. For example, 1,038 seconds for the 459 GB of Qwen3-32B.
    """
    return max(300, math.ceil(2 * save_seconds(nbytes)) + 120)


def describe_save(nbytes: int) -> str:
    """Return a phrase about the size of a checkpoint and the time of a save."""
    return (
        f"about {human(nbytes)} and {duration(math.ceil(save_seconds(nbytes)))} to write at "
        f"{human(BYTES_A_SECOND)} a second"
    )
