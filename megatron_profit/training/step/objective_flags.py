"""The flags of objectives: one for each option of each, made from its definition, and the schedule."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import Field
from typing import Any

from megatron_profit.flags import ArgumentsError, flag_of
from megatron_profit.objectives import (
    NORMALIZATIONS,
    RENAMED_NORMALIZATIONS,
    RENAMED_OPTIONS,
    SCHEDULE_SHAPES,
    Objective,
    OptionSchedule,
    ScheduledObjective,
    build_objective,
    load_objective,
    objective_names,
    objective_options,
)
from megatron_profit.training.step.kernel_flags import (
    BACKWARDS,
    IMPLEMENTATIONS,
    check_implementation,
)


def load_outside_objective(argv: Sequence[str]) -> None:
    """Import the objective that a command line asks for, so that its flags exist when it is parsed.

    Raises:
        ArgumentsError: The objective cannot be imported.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--objective", nargs="?")
    chosen = parser.parse_known_args(argv)[0].objective
    if chosen is not None:
        _load(chosen)


def _load(name: str) -> None:
    try:
        load_objective(name)
    except ValueError as error:
        raise ArgumentsError(f"--objective: {error}") from error


def add_objective_flags(group: argparse._ArgumentGroup) -> None:
    """Add `--objective` and the flags that every objective has."""
    group.add_argument(
        "--objective",
        default="profit",
        metavar="NAME",
        help=f"What is trained: {', '.join(objective_names())}, the name of an entry point of "
        "megatron_profit.objectives, or package.module:Class of your own.",
    )
    group.add_argument(
        "--objective-normalization",
        type=lambda name: RENAMED_NORMALIZATIONS.get(name, name),
        choices=NORMALIZATIONS,
        help="Divide the summed loss by the supervised tokens of the global batch (supervised) or by those "
        "that the objective keeps (kept); by default as the objective's source does.",
    )
    group.add_argument(
        "--objective-warmup-steps",
        type=int,
        default=0,
        metavar="N",
        help="Train the first N steps with plain SFT.",
    )
    group.add_argument(
        "--objective-schedule",
        nargs=4,
        action="append",
        metavar=("OPTION", "SHAPE", "START", "STEPS"),
        help="Let an option of the objective go from START to the value of its own flag over the first "
        f"STEPS steps after the warm-up; SHAPE is {', '.join(SCHEDULE_SHAPES)}. For example, "
        "prob_threshold linear 0.0 500. May be given once for each option.",
    )
    group.add_argument(
        "--log-entropy",
        action="store_true",
        help="Log the mean entropy of the predicted distributions, also where the objective needs none.",
    )
    group.add_argument(
        "--log-reference",
        action="store_true",
        help="Log the mean probability under the reference model (q), also of the kept tokens, where the "
        "objective does not read it. It costs a forward pass over the data: once, or in each step with "
        "--ref-mode adapter-off.",
    )
    group.add_argument(
        "--log-quantiles",
        nargs="+",
        type=float,
        metavar="Q",
        help="Log these quantiles of p over all supervised tokens of the global batch, such as 0.1 0.5.",
    )
    group.add_argument(
        "--objective-implementation",
        choices=IMPLEMENTATIONS,
        default="auto",
        help="fused: the kernel that never holds the logits of all tokens; reference: dense logits and "
        "plain autograd, slow and large, to compare with; auto is fused.",
    )
    group.add_argument(
        "--objective-backward",
        choices=BACKWARDS,
        default="auto",
        help="What the kernel keeps of the logits for its backward pass: save keeps them, which takes the "
        "fewest operations; recompute keeps none, which takes the least memory; auto keeps at most as "
        "much as the output layer's weight, or 256 MB on a CPU and 1.25 GiB on a GPU where that is more.",
    )


def add_option_flags(group: argparse._ArgumentGroup) -> None:
    """Add a flag for each option of the registered objectives.

    Raises:
        ArgumentsError: Two objectives have an option of the same name with another meaning.
    """
    try:
        for name, owners in _options_by_name().items():
            earlier = [flag_of(old) for old, new in RENAMED_OPTIONS.items() if new == name]
            group.add_argument(flag_of(name), *earlier, dest=name, **_flag_keywords(owners))
    except ValueError as error:
        raise ArgumentsError(f"--objective: {error}") from error


def objective_of(settings: Mapping[str, Any], given: Mapping[str, Any]) -> Objective:
    """Return the objective that the flags ask for.

    Args:
        settings: All arguments by name.
        given: The arguments that were given.

    Raises:
        ArgumentsError: An option is missing, out of range, or would be ignored.
    """
    chosen = settings["objective"]
    _load(chosen)
    own = {option.name for option in objective_options(chosen)}
    for name, owners in _options_by_name().items():
        if name in given and name not in own:
            raise ArgumentsError(
                f"{flag_of(name)} is an option of --objective {' and '.join(owners)}, not of {chosen}; "
                "drop it"
            )
    options = {name: given[name] for name in sorted(own) if name in given}
    try:
        objective = _build(settings, options)
        _check_effect(settings, objective)
    except ValueError as error:
        raise ArgumentsError(f"--objective {chosen}: {error}") from error
    return objective


def check_steps(objective: Objective, steps: int) -> None:
    """Refuse a warm-up or a constant schedule that leaves no step for an option that was given.

    Args:
        objective: The objective of the flags.
        steps: Steps of the whole run.

    Raises:
        ArgumentsError: The objective, or the final value of an option, would have no step.
    """
    if not isinstance(objective, ScheduledObjective):
        return
    left = steps - objective.warmup_steps
    if left < 1:
        raise ArgumentsError(
            f"--objective-warmup-steps {objective.warmup_steps} leaves no step of the run's {steps} for the "
            f"objective; give fewer than {steps}, or --objective sft"
        )
    for schedule in objective.schedules:
        if schedule.shape == "constant" and schedule.steps >= left:
            raise ArgumentsError(
                f"--objective-schedule {schedule.option} constant keeps its start for {schedule.steps} "
                f"steps, which are all {left} of the run, so {flag_of(schedule.option)} would be "
                "ignored; give fewer than that, or drop the schedule"
            )


def _build(settings: Mapping[str, Any], options: Mapping[str, Any]) -> Objective:
    objective = build_objective(settings["objective"], **options)
    schedules = tuple(
        OptionSchedule(RENAMED_OPTIONS.get(option, option), *shape)
        for option, *shape in settings["objective_schedule"] or ()
    )
    warmup = settings["objective_warmup_steps"]
    if not schedules and not warmup:
        return objective
    return ScheduledObjective(objective, schedules, warmup)


def _check_effect(settings: Mapping[str, Any], objective: Objective) -> None:
    """Refuse options without effect."""
    if settings["objective_normalization"] == "kept" and not objective.final.drops_tokens:
        raise ValueError(
            "--objective-normalization kept would change nothing, because this objective drops no "
            "token; drop the flag"
        )
    check_quantiles(settings["log_quantiles"] or ())
    check_implementation(settings["objective_implementation"], settings["objective_backward"])


def check_quantiles(quantiles: Sequence[float]) -> None:
    """Refuse numbers that are no quantiles.

    Raises:
        ValueError: One is out of (0, 1), or given twice.
    """
    for quantile in quantiles:
        if not 0 < quantile < 1:
            raise ValueError(
                f"--log-quantiles has {quantile}; quantiles are between 0 and 1, without the ends"
            )
        if quantiles.count(quantile) > 1:
            raise ValueError(f"--log-quantiles has {quantile} twice; drop one")


def _options_by_name() -> dict[str, dict[str, Field[Any]]]:
    """Return the objectives that have each option, by its name, in the order of the registry."""
    options: dict[str, dict[str, Field[Any]]] = {}
    for objective in objective_names():
        for option in objective_options(objective):
            options.setdefault(option.name, {})[objective] = option
    return options


def _flag_keywords(owners: Mapping[str, Field[Any]]) -> dict[str, Any]:
    """Return the keywords of `add_argument` for an option, which several objectives may share."""
    (first, option), *others = owners.items()
    if plain := [name for name, its_option in owners.items() if "help" not in its_option.metadata]:
        raise ValueError(
            f"the field {option.name} of objective {' and '.join(plain)} says nothing of its flag; declare "
            f'it as {option.name}: float = option("help", default=…, type=float), from '
            "megatron_profit.objectives"
        )
    for other, its_option in others:
        if _form(its_option) != _form(option):
            raise ValueError(
                f"objectives {first} and {other} have different options of the name {option.name}; "
                "rename one of them"
            )
    text = f"[{', '.join(owners)}] {option.metadata['help']}{_defaults(owners)}".replace("%", "%%")
    return {**option.metadata, "help": text, "default": None}


def _defaults(owners: Mapping[str, Field[Any]]) -> str:
    """Return the defaults of an option for its help; "" where it has none."""
    owners_of: dict[Any, list[str]] = {}
    for name, option in owners.items():
        owners_of.setdefault(option.default, []).append(name)
    is_one = len(owners_of) == 1
    if owners_of.pop(None, None) and not owners_of:
        return ""
    listed = (
        str(value) if is_one else f"{value} for {', '.join(names)}"
        for value, names in owners_of.items()
    )
    return f" (default {'; '.join(listed)})"


def _form(option: Field[Any]) -> dict[str, Any]:
    """Return the properties that must agree for two options to be one flag."""
    return {key: value for key, value in option.metadata.items() if key != "help"}
