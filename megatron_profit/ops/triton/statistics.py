"""Partial statistics of a block of logits in one read.

One program works on one row and one part of the block's columns, in steps of STEP columns. It keeps
the running maximum and sums of the online softmax (Milakov and Gimelshein, arXiv 1805.02867) in
registers, rescaled whenever the maximum grows, and writes them once. A row is cut into parts so that
few rows fill a GPU as well; ``PartialStatistics`` combines parts, blocks and ranks in the same way.
All arithmetic is float32. Offsets are int64: rows x columns may exceed 2**31.

The 20 largest logits, where an objective asks for them, are torch's topk: a second read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_profit.ops.partial_statistics import TOP_K, PartialStatistics
from megatron_profit.ops.tiling import Workspace

_STEP = 2048
_PART_COLUMNS = 16 * _STEP


def block_statistics(
    logits: Tensor,
    column: Tensor,
    target: Tensor | None,
    fields: PartialStatistics,
    workspace: Workspace,
) -> Tensor:
    """Partial statistics [P, fields, n] of logits [n, v]; see ``BlockKernels``."""
    num_rows, width = logits.shape
    num_parts = triton.cdiv(width, _PART_COLUMNS)
    parts = logits.new_empty(num_parts, fields.size, num_rows, dtype=torch.float32)
    with torch.cuda.device_of(logits):  # Triton starts a kernel on the current device
        _statistics_kernel[(num_rows, num_parts)](
            logits,
            column,
            target,
            parts,
            num_rows,
            width,
            logits.stride(0),
            NUM_FIELDS=fields.size,
            ENTROPY=_index(fields.entropy),
            SQUARES=_index(fields.sum_squared_prob),
            ABOVE=_index(fields.above),
            LOWER=_index(fields.lower),
            PART_COLUMNS=_PART_COLUMNS,
            STEP=min(_STEP, triton.next_power_of_2(width)),
        )
    if fields.top is not None:
        parts[:, fields.top] = -torch.inf
        count = min(TOP_K, width)
        top = slice(fields.top.start, fields.top.start + count)
        parts[0, top] = logits.topk(count, sorted=False).values.t().float()
    return parts


def _index(field: int | None) -> int:
    """Return the index of a field, -1 where it is not wanted."""
    return -1 if field is None else field


# The number of rows differs in every micro-batch. Without this, Triton would recompile for some of the
# values, for example multiples of 16.
@triton.jit(do_not_specialize=["num_rows"])
def _statistics_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [n, v] float16, bfloat16 or float32, rows `row_stride` apart
    column_ptr,  # [n] int64, the target's column; outside 0 .. v - 1 where it is not in this block
    target_ptr,  # [n] float32, the target's logit; None where it is not compared with
    parts_ptr,  # [P, NUM_FIELDS, n] float32, written
    num_rows,
    width,  # v
    row_stride,
    NUM_FIELDS: tl.constexpr,
    ENTROPY: tl.constexpr,  # index of the field, -1 where it is not wanted
    SQUARES: tl.constexpr,  # likewise
    ABOVE: tl.constexpr,  # likewise
    LOWER: tl.constexpr,  # likewise
    PART_COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    first = part * PART_COLUMNS
    last = tl.minimum(first + PART_COLUMNS, width)

    column = tl.load(column_ptr + row)
    minus_infinity = float("-inf")
    max_logit = tl.full((), minus_infinity, tl.float32)
    rest = tl.full((), 0.0, tl.float32)
    entropy = tl.full((), 0.0, tl.float32)
    squares = tl.full((), 0.0, tl.float32)
    above = tl.full((), 0.0, tl.float32)
    lower = tl.full((), 0.0, tl.float32)
    known = tl.full((), 0.0, tl.float32)
    if target_ptr is not None:
        known = tl.load(target_ptr + row)
    for start in range(first, last, STEP):
        columns = start + tl.arange(0, STEP)
        logits = tl.load(row_ptr + columns, mask=columns < last, other=minus_infinity)
        logits = logits.to(tl.float32)
        new_max = tl.maximum(max_logit, tl.max(logits, axis=0))
        base = tl.where(new_max == minus_infinity, 0.0, new_max)
        old_shift = max_logit - base
        scale = tl.exp(old_shift)
        shifted = logits - base
        exp = tl.where(columns == column, 0.0, tl.exp(shifted))
        if ENTROPY >= 0:
            # 0 * -inf is NaN; a logit of -inf contributes 0.
            term = tl.where(shifted == minus_infinity, 0.0, exp * shifted)
            moved = tl.where(old_shift == minus_infinity, 0.0, scale * old_shift)
            entropy = entropy * scale + moved * rest + tl.sum(term, axis=0)
        if SQUARES >= 0:
            squares = squares * scale * scale + tl.sum(exp * exp, axis=0)
        if ABOVE >= 0:
            # Columns after the last are -inf and never above.
            counted = (logits > known) & (columns != column)
            above += tl.sum(counted.to(tl.float32), axis=0)
        if LOWER >= 0:
            lower = lower * scale + tl.sum(tl.where(logits > known, 0.0, exp), axis=0)
        rest = rest * scale + tl.sum(exp, axis=0)
        max_logit = new_max

    is_here = (column >= first) & (column < last)
    target = tl.load(row_ptr + column, mask=is_here, other=minus_infinity).to(tl.float32)
    out_ptr = parts_ptr + part * NUM_FIELDS * num_rows + row
    tl.store(out_ptr, max_logit)
    tl.store(out_ptr + num_rows, rest)
    tl.store(out_ptr + 2 * num_rows, target)
    if ENTROPY >= 0:
        tl.store(out_ptr + ENTROPY * num_rows, entropy)
    if SQUARES >= 0:
        tl.store(out_ptr + SQUARES * num_rows, squares)
    if ABOVE >= 0:
        tl.store(out_ptr + ABOVE * num_rows, above)
    if LOWER >= 0:
        tl.store(out_ptr + LOWER * num_rows, lower)
