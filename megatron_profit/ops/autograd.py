"""The one gradient of all objectives, weight * (softmax - onehot), one block of vocabulary at a time.

Why this module has a backward pass of its own: some fused cross-entropies scale every token by
``grad_output[0]``, and some compute gradients before they know the upstream ones. Both are silently wrong as
soon as tokens have different weights. Here the forward pass keeps at most logits and never gradients. So
upstream gradients of any scale are applied in float32. Rows without a gradient are left out of the products.

Shapes: N tokens, M supervised rows, A active rows (of nonzero gradient), v vocabulary entries of a
block, H hidden, V vocabulary rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_profit.ops.collectives import VocabShard
from megatron_profit.ops.kernels import BlockKernels
from megatron_profit.ops.rows import SupervisedTokens, input_precision, statistics_dtype
from megatron_profit.ops.statistics import SoftmaxNormalizer
from megatron_profit.ops.tiling import GatheredLogits, Tiling, Workspace


@dataclass(frozen=True, eq=False)
class BackwardInputs:
    """Inputs of the backward pass, besides the tensors that autograd saves.

    Attributes:
        rows: the supervised rows.
        shard: the part of the vocabulary that this rank holds.
        tiling: the blocks of the forward pass.
        kernels: functions on a block of logits.
        kept: logits [kept_rows, v] of each block from the forward pass, all in one piece of memory; empty if
            none were kept. The first backward pass uses them up; a second one recomputes.
        reduce_hidden_grad: sum the gradient of hidden over the group.
        main_grad: [V, H] buffer. If given, the gradient of the weight is added to it and not returned.
    """

    rows: SupervisedTokens
    shard: VocabShard
    tiling: Tiling
    kernels: BlockKernels
    reduce_hidden_grad: bool
    kept: list[Tensor] = field(default_factory=list)
    main_grad: Tensor | None = None


class LinearObjectiveFunction(torch.autograd.Function):
    """Attaches a known per-token loss to the graph of hidden states and output layer.

    Inputs: hidden [N, H], weight [V, H], loss [M], coefficient [M] = -dloss/dlog p, the
    ``SoftmaxNormalizer``, and the work. Output: loss [N], 0 in the rows that are not supervised.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: Tensor,
        coefficient: Tensor,
        normalizer: SoftmaxNormalizer,
        work: BackwardInputs,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, coefficient, *normalizer)
        ctx.work = work
        return work.rows.scatter(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, coefficient, *normalizer = ctx.saved_tensors
        work: BackwardInputs = ctx.work
        with input_precision(hidden):
            grad_hidden, grad_weight = _input_gradients(
                hidden,
                weight,
                coefficient * grad_loss[work.rows.index],
                SoftmaxNormalizer(*normalizer),
                work,
                *ctx.needs_input_grad[:2],
            )
        if grad_hidden is not None and work.reduce_hidden_grad:
            _sum_rows_(grad_hidden, work)
        return grad_hidden, grad_weight, None, None, None, None


def _sum_rows_(grad_hidden: Tensor, work: BackwardInputs) -> None:
    """Sum the supervised rows of grad_hidden [N, H] over the group.

    Every rank enters with [M, H]: M follows from the labels alone, so the shapes agree.
    """
    if work.shard.is_split and len(work.rows):
        grad_hidden[work.rows.index] = work.shard.all_sum_(grad_hidden[work.rows.index])


def _input_gradients(
    hidden: Tensor,
    weight: Tensor,
    coefficient: Tensor,
    normalizer: SoftmaxNormalizer,
    work: BackwardInputs,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return this rank's part of the gradient of hidden [N, H], and the gradient of its weight [V, H].

    A gradient is None if it is not wanted; the weight's is None, too, if it went into ``main_grad``.
    """
    active = coefficient.nonzero().squeeze(1)
    hidden_rows = hidden[work.rows.index[active]]
    targets = work.rows.targets[active]
    workspace = Workspace(hidden.device)
    max_logit, sum_exp, log_prob = (vector[active] for vector in normalizer)
    # Computed from log p: next to 1, the softmax itself has lost the digits of p - 1.
    at_target = coefficient[active] * torch.expm1(log_prob)
    vectors = (coefficient[active], at_target, max_logit, sum_exp)
    logits_grad = _LogitsGradient(hidden_rows, active, vectors, work, workspace)
    hidden_grad = _HiddenGradient(hidden_rows, workspace) if want_hidden else None
    weight_grad = None
    if want_weight:
        written = work.shard.size if len(active) else 0
        weight_grad = _WeightGradient(weight, work.main_grad, written, workspace)
    for block in work.tiling.blocks(work.shard.size) if len(active) else ():
        column = work.shard.columns(targets, block)
        grad_logits = logits_grad.next_block(weight[block], column)
        if hidden_grad is not None:
            hidden_grad.add(grad_logits, weight[block], column)
        if weight_grad is not None:
            weight_grad.add(grad_logits, hidden_rows, block)
        del grad_logits  # after the last block nobody holds the kept logits
    grad_hidden = None
    if hidden_grad is not None:
        grad_hidden = torch.zeros_like(hidden)
        grad_hidden[work.rows.index[active]] = hidden_grad.sum.to(hidden.dtype)
    return grad_hidden, None if weight_grad is None else weight_grad.result()


class _LogitsGradient:
    """The gradient of the active rows' logits, one block after another.

    The logits come from the kept ones first and are then recomputed. Where all logits are kept and active,
    each block is overwritten by its gradient.

    Args:
        hidden_rows: [A, H].
        active: [A] ascending positions among the M rows.
        vectors: coefficient, at_target, max_logit and sum_exp, each [A]; see ``BlockKernels``.
        work: has the kept logits, which are used up.
        workspace: has the buffer of the result.
    """

    def __init__(
        self,
        hidden_rows: Tensor,
        active: Tensor,
        vectors: tuple[Tensor, ...],
        work: BackwardInputs,
        workspace: Workspace,
    ) -> None:
        self._kept, self._vectors = work.kept, vectors
        self._gradient_, self._workspace = work.kernels.gradient_, workspace
        self._kept_active = active[:0]
        if self._kept:
            self._kept_active = active
            if work.tiling.kept_rows < len(work.rows):
                self._kept_active = active[active < work.tiling.kept_rows]
        self._all_kept = len(self._kept_active) == len(active) == work.tiling.kept_rows
        self._size = len(active)
        self._recomputed = hidden_rows[len(self._kept_active) :]

    def next_block(self, weight: Tensor, column: Tensor) -> Tensor:
        """Return the gradient [A, v] on the next block of the weight, [v, H].

        The caller may overwrite it. ``column`` [A] holds the targets.
        """
        kept = self._kept.pop(0) if self._kept else None
        if kept is not None and self._all_kept:
            self._fill(kept, None, column, slice(None))
            return kept
        grad = self._workspace.buffer("logits", (self._size, weight.size(0)), weight.dtype)
        from_kept = len(self._kept_active)
        if kept is not None and from_kept:
            self._fill(grad, (kept, self._kept_active), column, slice(0, from_kept))
        if from_kept < self._size:
            torch.mm(self._recomputed, weight.t(), out=grad[from_kept:])
            self._fill(grad, None, column, slice(from_kept, None))
        return grad

    def _fill(self, grad: Tensor, source: GatheredLogits, column: Tensor, part: slice) -> None:
        """Fill a part of the rows of ``grad``."""
        coefficient, at_target, max_logit, sum_exp = (vector[part] for vector in self._vectors)
        self._gradient_(
            *(grad[part], source, column[part]),
            *(coefficient, at_target, max_logit, sum_exp),
            self._workspace,
        )


class _HiddenGradient:
    """The gradient of the active rows of hidden, summed over the blocks in float32 or wider.

    Where a product is rounded to half precision before it is added, the target's part is added separately.
    Most of a row's gradient is in the target's block, and it would be rounded once more.
    """

    def __init__(self, hidden_rows: Tensor, workspace: Workspace) -> None:
        self.sum = torch.zeros_like(hidden_rows, dtype=statistics_dtype(hidden_rows.dtype))
        self._workspace = workspace
        self._rounds = _rounds_products(self.sum, hidden_rows)

    def add(self, grad_logits: Tensor, weight: Tensor, column: Tensor) -> None:
        """Add grad_logits [A, v] @ weight [v, H]; the targets are in ``column`` [A]."""
        if not self._rounds:
            _add_product_(self.sum, grad_logits, weight, self._workspace)
            return
        rows = ((column >= 0) & (column < weight.size(0))).nonzero().squeeze(1)
        place = (rows, column[rows])
        at_target = grad_logits[place]
        grad_logits[place] = 0.0
        _add_product_(self.sum, grad_logits, weight, self._workspace)
        grad_logits[place] = at_target
        at_target = at_target.to(self.sum.dtype)[:, None]
        self.sum.index_add_(0, rows, at_target * weight[place[1]])


class _WeightGradient:
    """The gradient of the weight, one block after another.

    With Megatron's fused accumulation the gradient is added to ``main_grad``, and the parameter is marked
    accordingly. Autograd then gets a placeholder, which makes the hooks of Megatron's data parallelism run.
    Its values are never read, so they are left unwritten.
    """

    def __init__(
        self, weight: Tensor, main_grad: Tensor | None, written: int, workspace: Workspace
    ) -> None:
        """Allocate the gradient. Rows from ``written`` on stay zero."""
        self._weight, self._main_grad, self._workspace = weight, main_grad, workspace
        if main_grad is None:
            self._grad = torch.empty_like(weight)
            self._grad[written:].zero_()

    def add(self, grad_logits: Tensor, hidden_rows: Tensor, block: slice) -> None:
        """Add grad_logits.T [v, A] @ hidden_rows [A, H] to a block."""
        if self._main_grad is None:
            torch.mm(grad_logits.t(), hidden_rows, out=self._grad[block])
        else:
            _add_product_(self._main_grad[block], grad_logits.t(), hidden_rows, self._workspace)

    def result(self) -> Tensor | None:
        """Return the gradient for autograd."""
        if self._main_grad is None:
            return self._grad
        if not hasattr(self._weight, "grad_added_to_main_grad"):
            return None
        self._weight.grad_added_to_main_grad = True
        # Set for a weight that is the embedding as well. The embedding's gradient makes the hooks run, and
        # they add it to main_grad. Zeros returned here would take another tensor of this size.
        if getattr(self._weight, "zero_out_wgrad", False):
            return None
        return torch.empty_like(self._weight)


def _add_product_(total: Tensor, left: Tensor, right: Tensor, workspace: Workspace) -> None:
    """Add left @ right to total, in place and in the precision of ``total``, which may be wider."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif _rounds_products(total, left):
        product = workspace.buffer("product", total.shape, left.dtype)
        total.add_(torch.mm(left, right, out=product))
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _rounds_products(total: Tensor, factor: Tensor) -> bool:
    """Return whether a product is rounded to its factors' dtype before it reaches ``total``.

    This happens on a CPU: it has no product of half-precision factors with a float32 result (torch 2.15).
    """
    on_cuda = total.device.type == "cuda" and total.dtype == torch.float32
    return total.dtype != factor.dtype and not on_cuda
