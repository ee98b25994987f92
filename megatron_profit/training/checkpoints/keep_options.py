"""The flags of the checkpoints that stay and of an early stop. Help reads them without torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_profit.training.checkpoints.folder import BETTER


@dataclass(frozen=True)
class KeepOptions:
    """The options that the flags ask for.

    Attributes:
        last: Number of the newest checkpoints that stay; None for all.
        metric: The validation metric whose best checkpoint stays, and that an early stop watches.
        patience: Evaluations without a new best after which a run stops; None for never. For example, with 2
            a run stops at losses 1.0, 1.1, 1.05.
    """

    last: int | None = None
    metric: str | None = None
    patience: int | None = None


def add_keep_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of this module."""
    group.add_argument(
        "--keep-last",
        type=int,
        metavar="N",
        help="Remove checkpoints of --save but the N newest, the best one and the one resumed from.",
    )
    group.add_argument(
        "--keep-best",
        metavar="METRIC",
        help=f"Validation metric whose best checkpoint is never removed: {', '.join(BETTER)}.",
    )
    group.add_argument(
        "--early-stop",
        type=int,
        metavar="PATIENCE",
        help="End the run after this many evaluations in a row without a new best of --keep-best.",
    )
    group.add_argument(
        "--export-best",
        action="store_true",
        help="Let --export-hf write the best checkpoint by --keep-best, not the last weights.",
    )


def keep_options(settings: Mapping[str, Any]) -> KeepOptions:
    """Return the checked options of the flags.

    Args:
        settings: All arguments, by name.

    Raises:
        ValueError: Names the flag, its value and the remedy.
    """
    last, metric, patience = (settings[n] for n in ("keep_last", "keep_best", "early_stop"))
    for flag, value in (("--keep-last", last), ("--early-stop", patience)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} is {value}; it must be at least 1")
    if last is not None and not settings["save"]:
        raise ValueError(f"--keep-last {last} removes checkpoints of --save, which is missing")
    if last is not None and settings["save_retain_interval"]:
        raise ValueError(
            f"--save-retain-interval {settings['save_retain_interval']} removes checkpoints by a rule of its "
            f"own, those of --keep-last {last} among them; drop one of the two"
        )
    if metric is not None:
        _check_metric(metric, settings)
    elif patience is not None:
        raise ValueError(
            f"--early-stop {patience} needs the metric to watch; give --keep-best 'lm loss'"
        )
    elif settings["export_best"]:
        raise ValueError("--export-best needs the metric to judge by; give --keep-best 'lm loss'")
    if settings["export_best"] and not settings["export_hf"]:
        raise ValueError("--export-best is about what --export-hf writes, which is missing")
    return KeepOptions(last, metric, patience)


def _check_metric(metric: str, settings: Mapping[str, Any]) -> None:
    if metric not in BETTER:
        raise ValueError(
            f"--keep-best {metric!r} is not known to be better higher or lower; choose one of "
            f"{', '.join(map(repr, BETTER))}"
        )
    if not any(settings[name] for name in ("keep_last", "early_stop", "export_best")):
        raise ValueError(
            f"--keep-best {metric!r} does nothing where all checkpoints are kept; give --keep-last, "
            "--early-stop or --export-best as well"
        )
    if not settings["save"]:
        raise ValueError(f"--keep-best {metric!r} needs checkpoints; give --save DIR")
    if not (settings["valid_data"] or settings["valid_split"]) or settings["eval_iters"] == 0:
        raise ValueError(
            f"--keep-best {metric!r} is measured at evaluations, and there are none; give --valid-data or "
            "--valid-split"
        )
    saves, evaluates = settings["save_interval"], settings["eval_interval"]
    if saves % evaluates:
        raise ValueError(
            f"--keep-best {metric!r} compares checkpoints by the evaluation at the same iteration: "
            f"--save-interval {saves} must be a multiple of --eval-interval {evaluates}"
        )
