"""Training objectives: pure functions from token statistics to per-token losses and weights."""

# Importing a module registers its objective.
from megatron_profit.objectives import profit, sft  # noqa: F401
from megatron_profit.objectives.base import Objective, ObjectiveOutput, TokenStatistics
from megatron_profit.objectives.random_numbers import token_uniform
from megatron_profit.objectives.registry import (
    build_objective,
    objective_names,
    objective_options,
    register_objective,
)

__all__ = [
    "Objective",
    "ObjectiveOutput",
    "TokenStatistics",
    "build_objective",
    "objective_names",
    "objective_options",
    "register_objective",
    "token_uniform",
]
