"""The one gradient of all objectives, weight * (softmax - onehot), from recomputed logits.

Own backward on purpose: fused cross-entropies that scale every token by ``grad_output[0]`` are
silently wrong as soon as tokens have different weights. Rows without a gradient are left out of the
products.

Shapes: N tokens, M supervised rows, n rows of a chunk, H hidden, V vocabulary rows of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_profit.ops.collectives import VocabShard
from megatron_profit.ops.rows import (
    SupervisedRows,
    chunk_logits,
    input_precision,
    statistics_dtype,
)
from megatron_profit.ops.statistics import SoftmaxNormalizer


class LinearObjectiveFunction(torch.autograd.Function):
    """Attaches a known per-token loss to the graph of hidden states and output layer.

    Inputs: hidden [N, H], weight [V, H], loss [M], coefficient [M] = -dloss/dlog p, the normalizer
    of the softmax, the rows, the shard, and whether to sum the gradient of hidden over the group.
    Output: loss [N], 0 in the rows that are not supervised.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: Tensor,
        coefficient: Tensor,
        normalizer: SoftmaxNormalizer,
        rows: SupervisedRows,
        shard: VocabShard,
        reduce_hidden_grad: bool,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, coefficient, *normalizer)
        ctx.rows, ctx.shard, ctx.reduce_hidden_grad = rows, shard, reduce_hidden_grad
        return rows.scatter(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, coefficient, max_logit, sum_exp = ctx.saved_tensors
        grad_hidden, grad_weight = _input_gradients(
            hidden,
            weight,
            coefficient * grad_loss[ctx.rows.index],
            SoftmaxNormalizer(max_logit, sum_exp),
            ctx.rows,
            ctx.shard,
            *ctx.needs_input_grad[:2],
        )
        if grad_hidden is not None:
            # Every rank enters with [M, H]: M follows from the labels alone, so the shapes agree.
            if ctx.reduce_hidden_grad and len(ctx.rows):
                ctx.shard.all_sum_(grad_hidden)
            grad_hidden = ctx.rows.scatter(grad_hidden)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _input_gradients(
    hidden: Tensor,
    weight: Tensor,
    coefficient: Tensor,
    normalizer: SoftmaxNormalizer,
    rows: SupervisedRows,
    shard: VocabShard,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """This rank's part of the gradient of hidden [M, H], and the gradient of its weight [V, H]."""
    grad_hidden = hidden.new_zeros(len(rows), hidden.size(1)) if want_hidden else None
    # Half-precision products are summed over chunks in float32.
    accumulator = statistics_dtype(weight.dtype)
    grad_weight = torch.zeros_like(weight, dtype=accumulator) if want_weight else None
    active = coefficient.nonzero().squeeze(1)
    vocabulary = weight[: shard.size]
    with input_precision(hidden):
        for chunk in active.split(rows.chunk_rows) if shard.size else ():
            chunk_hidden = hidden[rows.index[chunk]]
            grad_logits = _logit_gradient(
                chunk_logits(chunk_hidden, vocabulary),
                rows.targets[chunk],
                coefficient[chunk],
                SoftmaxNormalizer(*(vector[chunk] for vector in normalizer)),
                shard,
            ).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_logits @ vocabulary
            if grad_weight is not None:
                _add_product_(grad_weight[: shard.size], grad_logits.t(), chunk_hidden)
    return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)


def _logit_gradient(
    logits: Tensor,
    targets: Tensor,
    coefficient: Tensor,
    normalizer: SoftmaxNormalizer,
    shard: VocabShard,
) -> Tensor:
    """coefficient * (softmax - onehot), [n, V]; overwrites ``logits``."""
    grad = logits.sub_(normalizer.max_logit[:, None]).exp_()
    grad.mul_((coefficient / normalizer.sum_exp)[:, None])
    row, here = shard.locate(targets)
    return grad.scatter_add_(1, row[:, None], -coefficient.masked_fill(~here, 0.0)[:, None])


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place and in the precision of ``total``, which may be wider."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # no such product elsewhere; the factors are exact in the wider dtype
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
