"""coefficient * (softmax - onehot) of rows of a block of logits: one read and one write.

One program works on one row and STEP columns. It finds its row of logits through an index, so that rows of no
gradient are left out without a copy of the others. The softmax is exp(logit - max) / sum, with the maximum
and the sum over the whole vocabulary, which are known by then. The target's own entry comes from the caller,
who knows p - 1 to the last digit. Arithmetic is float32; the result is rounded once, to the dtype of the
logits. Offsets are int64: rows x columns may exceed 2**31.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_profit.ops.tiling import GatheredLogits, Workspace

_STEP = 4096


def block_gradient_(
    grad: Tensor,
    source: GatheredLogits,
    column: Tensor,
    coefficient: Tensor,
    at_target: Tensor,
    max_logit: Tensor,
    sum_exp: Tensor,
    workspace: Workspace,
) -> None:
    """Fill ``grad`` [n, v]; see ``BlockKernels``."""
    num_rows, width = grad.shape
    logits, rows = (grad, None) if source is None else source
    step = min(_STEP, triton.next_power_of_2(width))
    with torch.cuda.device_of(grad):  # Triton starts a kernel on the current device
        _gradient_kernel[(num_rows, triton.cdiv(width, step))](
            logits,
            rows,
            grad,
            column,
            coefficient,
            at_target,
            max_logit,
            sum_exp,
            width,
            logits.stride(0),
            grad.stride(0),
            STEP=step,
        )


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [m, v] float16, bfloat16 or float32, rows `logits_stride` apart
    rows_ptr,  # [n] int64, which rows of the logits; None for all of them
    grad_ptr,  # [n, v] of the same dtype, rows `grad_stride` apart; the logits themselves without rows
    column_ptr,  # [n] int64, the target's column; outside 0 .. v - 1 where it is not in this block
    coefficient_ptr,  # [n] float32
    at_target_ptr,  # [n] float32, coefficient * (p - 1)
    max_ptr,  # [n] float32, largest logit over the vocabulary
    sum_ptr,  # [n] float32, sum of exp(logit - max) over the vocabulary
    width,  # v
    logits_stride,
    grad_stride,
    STEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = row if rows_ptr is None else tl.load(rows_ptr + row)
    columns = tl.program_id(1).to(tl.int64) * STEP + tl.arange(0, STEP)
    inside = columns < width
    logits = tl.load(logits_ptr + source * logits_stride + columns, mask=inside, other=0.0)
    factor = tl.load(coefficient_ptr + row) / tl.load(sum_ptr + row)
    gradient = tl.exp(logits.to(tl.float32) - tl.load(max_ptr + row)) * factor
    is_target = columns == tl.load(column_ptr + row)
    gradient = tl.where(is_target, tl.load(at_target_ptr + row), gradient)
    pointers = grad_ptr + row * grad_stride + columns
    tl.store(pointers, gradient.to(grad_ptr.dtype.element_ty), mask=inside)
