"""The functions that read and overwrite a block of logits, in several implementations.

The loop over blocks, the products and the collectives are the same for every device. Only the two functions
on a block of logits exist in several forms.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_profit.ops import torch_kernels
from megatron_profit.ops.partial_statistics import PartialStatistics
from megatron_profit.ops.tiling import GatheredLogits, Workspace

Implementation = Literal["auto", "torch", "triton", "reference"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("auto", "torch", "triton", "reference")

logger = logging.getLogger(__name__)


class BlockKernels(NamedTuple):
    """The two functions on logits [n, v] of a block of the vocabulary.

    Each takes ``column`` [n] int64, the target's column in the block, which is outside 0 .. v - 1 for a
    target in another block.

    Attributes:
        statistics: (logits, column, target, fields, workspace) to partial statistics [parts, fields, n]
            (see ``PartialStatistics``); leaves the logits as they are. ``target`` [n] holds the targets'
            logits in the precision of the statistics where ``fields.compares``, else it is None.
        gradient_: (grad, source, column, coefficient, at_target, max_logit, sum_exp, workspace) fills
            ``grad`` [n, v] with coefficient * (softmax - onehot) in its dtype; ``at_target`` is the
            value for the target's column. Without a ``source``, ``grad`` holds the logits. A ``source`` is
            (logits [m, v], rows [n] int64); then the logits are ``logits[rows]``.
    """

    statistics: Callable[[Tensor, Tensor, Tensor | None, PartialStatistics, Workspace], Tensor]
    gradient_: Callable[
        [Tensor, GatheredLogits, Tensor, Tensor, Tensor, Tensor, Tensor, Workspace], None
    ]


TORCH = BlockKernels(torch_kernels.block_statistics, torch_kernels.block_gradient_)


def choose_kernels(implementation: Implementation, logits_like: Tensor) -> BlockKernels:
    """Return the functions for logits of this tensor's device and dtype.

    ``auto`` takes Triton for float16, bfloat16 and float32 on an NVIDIA GPU, torch otherwise.

    Raises:
        ValueError: ``triton`` where it cannot run.
    """
    if implementation == "torch":
        return TORCH
    reason = triton_obstacle(logits_like)
    if implementation == "triton" and reason:
        raise ValueError(f"implementation='triton' cannot run here: {reason}; pass 'torch'.")
    if reason:
        if logits_like.is_cuda:
            _say_once(f"Triton kernels are not used: {reason}")
        return TORCH
    from megatron_profit.ops import triton

    return BlockKernels(triton.block_statistics, triton.block_gradient_)


def triton_obstacle(tensor: Tensor) -> str | None:
    """Return why Triton kernels cannot work on ``tensor``, or None if they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the inputs are {tensor.dtype} and not float16, bfloat16 or float32"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not tensor.is_cuda:
        return f"the inputs are on {tensor.device} and not on a CUDA device"
    if torch.version.hip is not None:
        return "they have been tested on NVIDIA GPUs only"
    return None


@cache
def _say_once(message: str) -> None:
    logger.warning(message)
