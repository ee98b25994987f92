"""Probability-guided supervised fine-tuning on Megatron-Core."""

__version__ = "0.1.0"
