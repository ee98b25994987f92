"""Kernels: the output layer and a training objective as one operation."""

from megatron_profit.ops.linear_objective import LinearObjectiveOutput, linear_objective
from megatron_profit.ops.reference import reference_linear_objective

__all__ = ["LinearObjectiveOutput", "linear_objective", "reference_linear_objective"]
