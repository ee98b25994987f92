"""Checkpoints of a bf16 or fp16 model in which some parameters are fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def all_as_float16(optimizer: Any) -> Iterator[None]:
    """Let an optimizer with fp32 copies take its fp32 parameters for copies of themselves in the block.

    Its checkpoints count parameters as if all of them were fp16 or bf16. With an fp32 one among them, the
    states of the others would be taken for states of their neighbours.

    Args:
        optimizer: Megatron's `Float16OptimizerWithFloat16Params`.
    """
    halves, copies = optimizer.float16_groups, optimizer.fp32_from_float16_groups
    half_of = {
        id(copy): half
        for group in zip(halves, copies, strict=True)
        for half, copy in zip(*group, strict=True)
    }
    trained = [group["params"] for group in optimizer.optimizer.param_groups]
    optimizer.float16_groups = [[half_of.get(id(p), p) for p in group] for group in trained]
    optimizer.fp32_from_float16_groups = trained
    try:
        yield
    finally:
        optimizer.float16_groups, optimizer.fp32_from_float16_groups = halves, copies
