"""The plan of a run: everything that is decided and opened before Megatron starts."""

from megatron_profit.training.plan.run_plan import RunPlan, plan_run

__all__ = ["RunPlan", "plan_run"]
