"""The providers of a run: the class that gives each external statistic of its objective.

The built-in classes are listed here. An objective names the classes of its own statistics in
`Objective.providers`. Statistics that follow from the whole global batch (`Objective.lookahead`) come from
the objective itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Set
from typing import Any

from megatron_profit.flags import ArgumentsError, flag_of
from megatron_profit.objectives import Objective
from megatron_profit.objectives.base import KERNEL_STATISTICS
from megatron_profit.training.statistics.external_statistics import RunParts, StatisticProvider
from megatron_profit.training.statistics.lookahead import Lookahead
from megatron_profit.training.statistics.old_policy import OldPolicy
from megatron_profit.training.statistics.reference_model import (
    ReferenceLowerMass,
    ReferenceModel,
)
from megatron_profit.training.statistics.running_threshold import (
    RunningMaximum,
    RunningMinimum,
    RunningThreshold,
)

BUILT_IN: Mapping[str, type[StatisticProvider]] = {
    provider.statistic: provider
    for provider in (ReferenceModel, ReferenceLowerMass, OldPolicy, RunningMinimum, RunningMaximum)
}
# The random numbers of a micro-batch, which `ObjectiveLoss` draws.
_DRAWN = "uniform"


def provider_classes(
    objective: Objective, logged: Set[str] = frozenset()
) -> dict[str, type[StatisticProvider]]:
    """Return the class of the provider of each external statistic that a run needs, by its name.

    Args:
        objective: The objective of the run.
        logged: External statistics that the run logs besides.

    Raises:
        ArgumentsError: A statistic has no provider, or the objective names something else than one.
    """
    objective = objective.final
    evaluated = _provided(objective.for_evaluation())
    names = sorted(_provided(objective) | evaluated | logged)
    needed = {name: _provider_class(objective, name) for name in names}
    for name in sorted(evaluated):
        if not needed[name].in_evaluation:
            raise ArgumentsError(
                f"an evaluation cannot know the statistic {name}; let `for_evaluation` return an objective "
                "without it"
            )
    return needed


def _provided(objective: Objective) -> frozenset[str]:
    """Return the external statistics of an objective that a provider gives."""
    return objective.needed_statistics - {*KERNEL_STATISTICS, _DRAWN, *objective.lookahead}


def _provider_class(objective: Objective, statistic: str) -> type[StatisticProvider]:
    place = objective.providers.get(statistic)
    if place is None:
        if statistic not in BUILT_IN:
            raise ArgumentsError(
                f"no class provides the statistic {statistic} that it needs; name one in its `providers`, or "
                f"choose from {', '.join((*KERNEL_STATISTICS, *sorted(BUILT_IN)))}"
            )
        return BUILT_IN[statistic]
    module, _, name = place.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentsError(
            f"the provider {place!r} of the statistic {statistic} cannot be loaded: {error}; give "
            "package.module:Class"
        ) from error
    if not (isinstance(found, type) and issubclass(found, StatisticProvider)):
        raise ArgumentsError(f"{place!r} is {found!r}; a provider extends StatisticProvider")
    if (its_own := getattr(found, "statistic", None)) != statistic:
        raise ArgumentsError(
            f"the provider {place!r} is named for {statistic}, but its statistic is {its_own!r}"
        )
    return found


def check_providers(
    objective: Objective, settings: Mapping[str, Any], from_command_line: Mapping[str, Any]
) -> None:
    """Check the arguments of the providers, and refuse the ones that no provider of the run reads.

    Args:
        objective: The objective of the run.
        settings: All arguments by name.
        from_command_line: The arguments that were given.

    Raises:
        ArgumentsError: Names the flag and what to do, or a statistic without a provider.
    """
    logged = {ReferenceModel.statistic} if settings["log_reference"] else set()
    needed = provider_classes(objective, logged)
    read = {name for provider in needed.values() for name in provider.flags}
    for statistic, provider in {**BUILT_IN, **needed}.items():
        if statistic in needed:
            provider.check(settings)
            continue
        for name, whose in provider.flags.items():
            if name in from_command_line and name not in read:
                raise ArgumentsError(
                    f"{flag_of(name)} is for {whose}, not for --objective {settings['objective']} with these "
                    "options; drop it"
                )


def make_providers(run: RunParts) -> tuple[StatisticProvider, ...]:
    """Return the providers of a run; the ones that a look-ahead may need come first."""
    classes = provider_classes(run.loss.objective, run.loss.logged_statistics)
    providers = [provider.from_run(run) for provider in classes.values()]
    # A running threshold, and perhaps a user's provider, makes a pass of its own, which reads the reference.
    providers.sort(key=lambda p: isinstance(p, RunningThreshold) or p.statistic not in BUILT_IN)
    run.lookahead_pass.providers.extend(providers)
    return *providers, *Lookahead.of_all(run.loss, run.lookahead_pass)
