"""Imported for its effect: what a run of the training entry on the CPU needs is there afterwards."""

from megatron_profit.megatron_patches import activate

activate("cpu")
import megatron_profit.training.main  # noqa: F401
