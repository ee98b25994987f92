"""Changes to Megatron's loggers, TensorBoard and W&B: they never end a run, and a resumed run
continues them.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint_conversion.errors import warn
from megatron_profit.megatron_patches.callbacks import RunFailure
from megatron_profit.megatron_patches.enduring import Enduring, Guard, reason
from megatron_profit.megatron_patches.loop import CROSS_ENTROPY
from megatron_profit.megatron_patches.patch import Patch, replaced

# Curves that repeat others: over samples in place of steps, or under another name.
_REPEATED = (" vs samples", "samples vs steps", "iteration-time", "throughput")
_OF_SPEED = ("per second", "per step", "per GPU", "/gpu", "memory", "time")
_VALIDATION = re.compile(r"(.+) validation(.*)")
_PERPLEXITY = " validation ppl"


def curve_of(name: str) -> str | None:
    """Return the name of a curve in its group; None for one that repeats another one or has no meaning.

    For example, "lm loss validation" is "validation/lm loss", and "tokens per second" is
    "speed/tokens per second".
    """
    if name.endswith(_REPEATED):
        return None
    if name.endswith(_PERPLEXITY) and name != CROSS_ENTROPY + _PERPLEXITY:
        return None  # Megatron has one of each metric
    if found := _VALIDATION.fullmatch(name):
        return f"validation/{found[1]}{found[2]}"
    if any(part in name for part in _OF_SPEED):
        return f"speed/{name}"
    return f"tokens/{name}" if "tokens" in name else f"train/{name}"


class _Grouped:
    """A W&B module or run whose values are logged in groups."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def log(self, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        named = {curve_of(name): value for name, value in values.items()}
        named.pop(None, None)
        return self._target.log(named, *args, **kwargs) if named else None


def _group_curves(writer: Any, args: Any) -> None:
    """Name a TensorBoard writer's curves by groups, and give it the arguments as hyperparameters."""
    add_scalar = writer.add_scalar

    @functools.wraps(add_scalar)
    def grouped(tag: str, *values: Any, **kwargs: Any) -> None:
        curve = curve_of(tag)
        if curve is not None:
            add_scalar(curve, *values, **kwargs)

    writer.add_scalar = grouped
    plain = {k: v for k, v in vars(args).items() if isinstance(v, bool | int | float | str)}
    from torch.utils.tensorboard.summary import hparams

    with contextlib.suppress(OSError):  # of a full disk; the next value reports it
        for summary in hparams(plain, {}):
            writer.file_writer.add_summary(summary)


class _Nowhere:
    """A TensorBoard writer without a file: Megatron logs to W&B only where there is a writer."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _write_curves_that_endure() -> None:
    from megatron.training import global_vars

    original = global_vars._set_tensorboard_writer

    @functools.wraps(original)
    def set_tensorboard_writer(args: Any) -> None:
        from torch.utils import tensorboard

        purge_step = getattr(args, "first_step", None) if has_curves(args.tensorboard_dir) else None
        from_step = functools.partial(tensorboard.SummaryWriter, purge_step=purge_step)
        try:
            with replaced(tensorboard, SummaryWriter=from_step):
                original(args)
        except OSError as error:
            warn(f"--tensorboard-dir {args.tensorboard_dir} cannot be written ({reason(error)})")
        writer = global_vars._GLOBAL_TENSORBOARD_WRITER
        if writer is not None:
            _group_curves(writer, args)
            _endure(writer, args.tensorboard_dir)
        elif args.wandb_project and args.rank == args.world_size - 1:
            global_vars._GLOBAL_TENSORBOARD_WRITER = _Nowhere()

    global_vars._set_tensorboard_writer = set_tensorboard_writer


def has_curves(folder: str | None) -> bool:
    """Return whether a folder holds TensorBoard's events."""
    return folder is not None and any(Path(folder).glob("events.out.tfevents.*"))


def _endure(writer: Any, folder: str) -> None:
    """Let the thread that writes the events survive a failed write."""
    queue = writer.file_writer.event_writer._async_writer
    enduring = Enduring(queue._writer, Guard(f"--tensorboard-dir {folder}"))
    queue._writer = queue._worker._record_writer = enduring


def _log_to_wandb_that_endures() -> None:
    from megatron.training import global_vars, wandb_utils

    original, guard = global_vars._set_wandb_writer, Guard("the log of W&B")

    @functools.wraps(original)
    def set_wandb_writer(args: Any) -> None:
        try:
            original(args)
        except Exception as error:  # W&B has exceptions of its own for a missing key or network
            raise RunFailure(
                f"W&B cannot be started: {reason(error)}; set WANDB_MODE=offline, or drop --wandb-project"
            ) from error
        writer = global_vars._GLOBAL_WANDB_WRITER
        if writer is not None:
            global_vars._GLOBAL_WANDB_WRITER = Enduring(_Grouped(writer), guard)

    global_vars._set_wandb_writer = set_wandb_writer
    for name in ("on_save_checkpoint_success", "on_load_checkpoint_success"):
        setattr(wandb_utils, name, guard(getattr(wandb_utils, name)))


LOGGER_PATCHES = (
    Patch(
        name="tensorboard-writer",
        functions=("megatron/training/global_vars.py:_set_tensorboard_writer",),
        reason="A full disk ends the thread that writes TensorBoard's events, and with the next value the "
        "run. A run that goes on from a checkpoint shows the steps after it twice. And without TensorBoard, "
        "W&B is given no values.",
        apply=_write_curves_that_endure,
    ),
    Patch(
        name="wandb-writer",
        functions=(
            "megatron/training/global_vars.py:_set_wandb_writer",
            "megatron/training/wandb_utils.py:on_save_checkpoint_success",
            "megatron/training/wandb_utils.py:on_load_checkpoint_success",
        ),
        reason="An error of W&B ends the run.",
        apply=_log_to_wandb_that_endures,
    ),
)
