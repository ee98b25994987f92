"""The two functions on a block of logits in plain torch: any device, any floating dtype.

Several passes over some rows at a time, each in place in a buffer that stays in the cache of a CPU.

Shapes: n rows, v vocabulary entries of the block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_profit.ops.partial_statistics import (
    MAX_LOGIT,
    REST,
    TARGET,
    TOP_K,
    PartialStatistics,
    finite_max,
)
from megatron_profit.ops.rows import statistics_dtype
from megatron_profit.ops.tiling import GatheredLogits, Workspace, pass_entries

# exp(x) = exp2(x * log2(e)). torch's exp takes 2.7 times as long on a CPU (AVX-512, torch 2.15), and a GPU
# computes exp this way itself. Rounding the product does no harm: a probability near 1 has x near 0.
_LOG2_E = math.log2(math.e)
# To find the largest logits, only this many groups are searched: the ones with the largest maxima.
_GROUP = 32


def block_statistics(
    logits: Tensor,
    column: Tensor,
    target: Tensor | None,
    fields: PartialStatistics,
    workspace: Workspace,
) -> Tensor:
    """Partial statistics [1, fields, n] of logits [n, v]; see ``BlockKernels``."""
    part = logits.new_empty(fields.size, len(logits), dtype=statistics_dtype(logits.dtype))
    for some in _passes(logits):
        known = None if target is None else target[some, None]
        _row_statistics(logits[some], column[some], known, fields, part[:, some], workspace)
    return part[None]


def _row_statistics(
    logits: Tensor,
    column: Tensor,
    known: Tensor | None,
    fields: PartialStatistics,
    part: Tensor,
    workspace: Workspace,
) -> None:
    """Fill ``part`` [fields, n], given the targets' logits ``known`` [n, 1] if they are to be compared."""
    shifted = _upcast(logits, workspace)
    column, here = _within(column, logits.size(1))
    target = shifted.gather(1, column[:, None])[:, 0]
    part[TARGET] = target.masked_fill(~here, -torch.inf)
    part[MAX_LOGIT] = shifted.amax(1)
    if fields.top is not None:
        part[fields.top] = _largest(shifted)
    # The sums leave the target out.
    shifted.scatter_(1, column[:, None], target.masked_fill(here, -torch.inf)[:, None])
    above = None
    if known is not None:
        above = torch.gt(shifted, known, out=workspace.buffer("above", shifted.shape, torch.bool))
        if fields.above is not None:
            part[fields.above] = above.sum(1)
    shifted.sub_(finite_max(part[MAX_LOGIT])[:, None])
    shifted.mul_(_LOG2_E)
    if fields.entropy is None:
        exp = shifted.exp2_()
    else:
        exp = torch.exp2(shifted, out=workspace.buffer("exp", shifted.shape, shifted.dtype))
        # A logit of -inf has probability 0 and contributes 0; 0 * -inf would be NaN.
        shifted.clamp_(min=torch.finfo(shifted.dtype).min).mul_(exp)
        part[fields.entropy] = shifted.sum(1) / _LOG2_E
    part[REST] = exp.sum(1)
    if fields.lower is not None and above is not None:
        # A sum of its own and not the rest minus the others, which would lose the digits of a small one.
        lower = workspace.buffer("lower", exp.shape, exp.dtype)
        part[fields.lower] = torch.mul(exp, above.logical_not_(), out=lower).sum(1)
    if fields.sum_squared_prob is not None:
        part[fields.sum_squared_prob] = exp.square_().sum(1)


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
    """Fill ``grad`` [n, v] with coefficient * (softmax - onehot); see ``BlockKernels``."""
    column, here = _within(column, grad.size(1))
    column, here, at_target = column[:, None], here[:, None], at_target[:, None]
    factor = (coefficient / sum_exp)[:, None]
    upcast = statistics_dtype(grad.dtype) != grad.dtype
    for some in _passes(grad):
        if source is not None:
            logits, rows = source
            torch.index_select(logits, 0, rows[some], out=grad[some])
        result = _upcast(grad[some], workspace) if upcast else grad[some]
        result.sub_(max_logit[some, None]).mul_(_LOG2_E).exp2_().mul_(factor[some])
        found = result.gather(1, column[some])
        result.scatter_(1, column[some], torch.where(here[some], at_target[some], found))
        if upcast:
            grad[some] = result


def _passes(logits: Tensor) -> Iterator[slice]:
    """Yield the rows of each pass."""
    rows = max(1, pass_entries(logits) // logits.size(1))
    for start in range(0, logits.size(0), rows):
        yield slice(start, start + rows)


def _within(column: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return [n] columns and which of them lie in 0 .. ``width`` - 1; columns outside are replaced by 0."""
    here = (column >= 0) & (column < width)
    return column.masked_fill(~here, 0), here


def _upcast(logits: Tensor, workspace: Workspace) -> Tensor:
    """Return a copy [n, v] to work on, in the precision of the statistics."""
    dtype = statistics_dtype(logits.dtype)
    return workspace.buffer("upcast", logits.shape, dtype).copy_(logits)


def _largest(logits: Tensor) -> Tensor:
    """Return the 20 largest logits of each row, [20, n], in any order; -inf where there are fewer.

    A logit outside the 20 groups with the largest maxima is at most as large as 20 others. So only these
    groups are searched: a search among all logits is slow on a CPU.
    """
    width = logits.size(1)
    if width < TOP_K:
        return torch.nn.functional.pad(logits, (0, TOP_K - width), value=-torch.inf).t()
    grouped = width - width % _GROUP
    if grouped <= TOP_K * _GROUP:
        return logits.topk(TOP_K, sorted=False).values.t()
    groups = logits[:, :grouped].unflatten(1, (-1, _GROUP))
    best = groups.amax(2).topk(TOP_K, sorted=False).indices
    candidates = groups.gather(1, best[:, :, None].expand(-1, -1, _GROUP)).flatten(1)
    return torch.cat([candidates, logits[:, grouped:]], 1).topk(TOP_K, sorted=False).values.t()
