"""Imported for its effect: what a run of the training entry on the CPU needs is there afterwards."""

from megatron_profit.backends import activate

activate("cpu")
import megatron_profit.training.main  # noqa: F401
