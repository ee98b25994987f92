"""Training objectives: pure functions from token statistics to per-token losses and weights."""

# Importing a module registers its objective.
from megatron_profit.objectives import entropy, profit, psft, sft  # noqa: F401
from megatron_profit.objectives.base import (
    COMPUTED_STATISTICS,
    GIVEN_STATISTICS,
    NORMALIZATIONS,
    Objective,
    ObjectiveOutput,
    TokenStatistics,
    option,
)
from megatron_profit.objectives.random_numbers import token_uniform
from megatron_profit.objectives.ranking import RankedObjective, kept_count, top_share
from megatron_profit.objectives.registry import (
    build_objective,
    objective_names,
    objective_options,
    register_objective,
)

__all__ = [
    "COMPUTED_STATISTICS",
    "GIVEN_STATISTICS",
    "NORMALIZATIONS",
    "Objective",
    "ObjectiveOutput",
    "RankedObjective",
    "TokenStatistics",
    "build_objective",
    "kept_count",
    "objective_names",
    "objective_options",
    "option",
    "register_objective",
    "token_uniform",
    "top_share",
]
