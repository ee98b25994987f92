"""The two functions on a block of logits as Triton kernels for NVIDIA GPUs, one file for each."""

from megatron_profit.ops.triton.gradient import block_gradient_
from megatron_profit.ops.triton.statistics import block_statistics

__all__ = ["block_gradient_", "block_statistics"]
