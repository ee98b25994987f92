"""Training objectives: pure functions from token statistics to per-token losses and weights."""

# Importing a module registers its objective.
from megatron_profit.objectives import (  # noqa: F401
    asft,
    chord_phi,
    deft,
    dft,
    eaft,
    entropy,
    generalized_cross_entropy,
    infosft,
    iw_sft,
    prift,
    profit,
    psft,
    rho1,
    sft,
    stm,
    talr,
)
from megatron_profit.objectives.base import (
    COMPUTED_STATISTICS,
    EXTERNAL_STATISTICS,
    NORMALIZATIONS,
    Objective,
    ObjectiveOutput,
    StatisticsOnly,
    TokenStatistics,
    option,
    weighted_nll,
)
from megatron_profit.objectives.random_numbers import token_uniform
from megatron_profit.objectives.ranking import RankedObjective, kept_count, top_share
from megatron_profit.objectives.registry import (
    RENAMED_NORMALIZATIONS,
    RENAMED_OPTIONS,
    build_objective,
    load_objective,
    objective_names,
    objective_options,
    register_objective,
)
from megatron_profit.objectives.schedule import (
    SCHEDULE_SHAPES,
    OptionSchedule,
    ScheduledObjective,
)
from megatron_profit.objectives.signals import OBJECTIVE_SIGNALS, SignalObjective

__all__ = [
    "COMPUTED_STATISTICS",
    "EXTERNAL_STATISTICS",
    "NORMALIZATIONS",
    "OBJECTIVE_SIGNALS",
    "RENAMED_NORMALIZATIONS",
    "RENAMED_OPTIONS",
    "SCHEDULE_SHAPES",
    "Objective",
    "ObjectiveOutput",
    "OptionSchedule",
    "RankedObjective",
    "ScheduledObjective",
    "SignalObjective",
    "StatisticsOnly",
    "TokenStatistics",
    "build_objective",
    "kept_count",
    "load_objective",
    "objective_names",
    "objective_options",
    "option",
    "register_objective",
    "token_uniform",
    "top_share",
    "weighted_nll",
]
