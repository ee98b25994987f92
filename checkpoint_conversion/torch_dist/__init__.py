"""Megatron's torch_dist checkpoints: read, written and checked without Megatron and without torch."""
