"""coefficient * (softmax - onehot) in place of a block of logits: one read and one write.

One program works on one row and STEP columns. The softmax is exp(logit - max) / sum with the
maximum and the sum over the whole vocabulary, which are known by then. Arithmetic is float32; the
result is rounded once, to the dtype of the logits. Offsets are int64: rows x columns may exceed
2**31.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_profit.ops.tiling import Workspace

_STEP = 4096


def block_gradient_(
    logits: Tensor,
    column: Tensor,
    here: Tensor,
    coefficient: Tensor,
    max_logit: Tensor,
    sum_exp: Tensor,
    workspace: Workspace,
) -> None:
    """Replaces logits [n, v] by their gradient; see ``BlockKernels``."""
    num_rows, width = logits.shape
    step = min(_STEP, triton.next_power_of_2(width))
    _gradient_kernel[(num_rows, triton.cdiv(width, step))](
        logits,
        column.masked_fill(~here, -1),
        coefficient,
        coefficient / sum_exp,
        max_logit,
        width,
        logits.stride(0),
        STEP=step,
    )


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [n, v] float16, bfloat16 or float32, rows `row_stride` apart; overwritten
    column_ptr,  # [n] int64, the target's column; -1 where it is not in this block
    coefficient_ptr,  # [n] float32
    factor_ptr,  # [n] float32, coefficient / sum of exp(logit - max) over the vocabulary
    max_ptr,  # [n] float32, largest logit over the vocabulary
    width,  # v
    row_stride,
    STEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * STEP + tl.arange(0, STEP)
    inside = columns < width
    pointers = logits_ptr + row * row_stride + columns
    logits = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.exp(logits - tl.load(max_ptr + row)) * tl.load(factor_ptr + row)
    at_target = columns == tl.load(column_ptr + row)
    gradient = tl.where(at_target, gradient - tl.load(coefficient_ptr + row), gradient)
    tl.store(pointers, gradient.to(logits_ptr.dtype.element_ty), mask=inside)
