"""The flags of the checkpoints that stay and of an early stop. Help reads them without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_profit.flags import ArgumentsError, flag, flag_of, options_of
from megatron_profit.objectives import Objective
from megatron_profit.training.checkpoints.folder import BETTER


@dataclass(frozen=True)
class KeepOptions:
    """The checkpoints that stay, and an early stop.

    For example, with `early_stop` 2 a run stops at losses 1.0, 1.1, 1.05.
    """

    keep_last: int | None = flag(
        "Remove checkpoints of --save but the N newest, the best one and the one resumed from.",
        type=int,
        metavar="N",
    )
    keep_best: str | None = flag(
        f"Validation metric whose best checkpoint is never removed: {', '.join(BETTER)}, or a task of "
        "--eval-tasks with --eval-tasks-interval.",
        metavar="METRIC",
    )
    early_stop: int | None = flag(
        "End the run after this many evaluations in a row without a new best of --keep-best.",
        type=int,
        metavar="PATIENCE",
    )
    export_best: bool = flag(
        "Let --export-hf and --export-adapter write the best checkpoint by --keep-best, not the last one.",
        default=False,
        action="store_true",
    )


def keep_options(settings: Mapping[str, Any], tasks: Sequence[str] = ()) -> KeepOptions:
    """Return the checked options of the flags.

    Args:
        settings: All arguments, by name.
        tasks: The tasks that the run evaluates every `eval_tasks_interval` steps.

    Raises:
        ArgumentsError: Names the flag, its value and the remedy.
    """
    options = options_of(KeepOptions, settings)
    last, metric, patience = options.keep_last, options.keep_best, options.early_stop
    for name in ("keep_last", "early_stop"):
        value = settings[name]
        if value is not None and value < 1:
            raise ArgumentsError(f"{flag_of(name)} is {value}; it must be at least 1")
    if last is not None and not settings["save"]:
        raise ArgumentsError(f"--keep-last {last} removes checkpoints of --save, which is missing")
    if last is not None and settings["save_retain_interval"]:
        raise ArgumentsError(
            f"--save-retain-interval {settings['save_retain_interval']} removes checkpoints by a rule of its "
            f"own, and with them some that --keep-last {last} keeps; drop one of the two"
        )
    if metric is not None:
        _check_metric(metric, settings, tasks)
    elif patience is not None:
        raise ArgumentsError(
            f"--early-stop {patience} needs the metric to watch; give --keep-best 'lm loss'"
        )
    elif options.export_best:
        raise ArgumentsError(
            "--export-best needs the metric to judge by; give --keep-best 'lm loss'"
        )
    if options.export_best and not (settings["export_hf"] or settings["export_adapter"]):
        raise ArgumentsError("--export-best is about what --export-hf writes, which is missing")
    return options


def misleading_metric(options: KeepOptions, objective: Objective) -> str | None:
    """Return a hint if the metric of --keep-best can be best in a worse checkpoint, else None."""
    metric, name = options.keep_best, objective.final.name
    if metric == "lm loss" and name != "sft":
        why = (
            "the plain cross-entropy also counts the tokens that the objective leaves out or trains less. It "
            "may rise while the run does what it should, and then the first checkpoint is the best one"
        )
    elif metric == "objective" and not objective.for_evaluation().loss_follows_prob:
        why = (
            "a token's loss is small as well where the model finds the token improbable, so that a worse "
            "checkpoint can be the best one"
        )
    else:
        return None
    return (
        f"--keep-best {metric!r} with --objective {name}: {why}. --keep-best 'mean p' follows the "
        "probability of each token"
    )


def _check_metric(metric: str, settings: Mapping[str, Any], tasks: Sequence[str]) -> None:
    from megatron_profit.evaluation.questions import task_names

    if metric in task_names() and metric not in tasks:
        raise ArgumentsError(
            f"--keep-best {metric!r} is a task that the training does not evaluate; give --eval-tasks "
            f"{metric} --eval-tasks-interval N, or choose one of {', '.join(map(repr, BETTER))}"
        )
    if metric not in (*BETTER, *tasks):
        raise ArgumentsError(
            f"--keep-best {metric!r} is not known to be better higher or lower; choose one of "
            f"{', '.join(map(repr, BETTER))}"
        )
    if not any(settings[name] for name in ("keep_last", "early_stop", "export_best")):
        raise ArgumentsError(
            f"--keep-best {metric!r} does nothing where all checkpoints are kept; give --keep-last, "
            "--early-stop or --export-best as well"
        )
    if not settings["save"]:
        raise ArgumentsError(f"--keep-best {metric!r} needs checkpoints; give --save DIR")
    if not (settings["valid_data"] or settings["valid_split"]) or settings["eval_iters"] == 0:
        raise ArgumentsError(
            f"--keep-best {metric!r} is measured at evaluations, and there are none; give --valid-data or "
            "--valid-split"
        )
    interval = "eval_tasks_interval" if metric in tasks else "eval_interval"
    saves, evaluates = settings["save_interval"], settings[interval]
    if saves % evaluates:
        raise ArgumentsError(
            f"--keep-best {metric!r} compares checkpoints by the evaluation at the same iteration: "
            f"--save-interval {saves} must be a multiple of {flag_of(interval)} {evaluates}"
        )
