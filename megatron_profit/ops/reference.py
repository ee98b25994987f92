"""The objective on dense logits with plain autograd: the result that ``linear_objective`` must equal.

Written for reading and for tests. It holds the whole vocabulary and all logits at once; where the vocabulary
is split, the parts are gathered first. It shares no computation with the kernel. Its gradient comes from the
objective's loss, not from the objective's weight.

Shape suffixes: N tokens, M supervised rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from megatron_profit.objectives import Objective, TokenStatistics
from megatron_profit.ops.collectives import VocabShard
from megatron_profit.ops.rows import SupervisedTokens
from megatron_profit.ops.statistics import LinearObjectiveOutput, LinearObjectiveStatistics
from megatron_profit.ops.validation import join_external


def reference_linear_objective(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    objective: Objective,
    *,
    group: dist.ProcessGroup | None = None,
    loss_weight: Tensor | None = None,
    vocab_size: int | None = None,
    external: Mapping[str, Tensor] | None = None,
    reduce_hidden_grad: bool = True,
    **named: Tensor | None,
) -> LinearObjectiveOutput:
    """Compute the loss of each token and all its statistics on dense logits.

    Args:
        hidden: [N, H]; float64 makes an exact reference, float16 or bfloat16 the usual half-precision loss
            (logits in the input dtype, log-softmax in float32).
        weight: [V, H], the whole vocabulary, or this rank's rows of it.
        labels: [N] int64; -100 is unsupervised.
        objective: gives the loss.
        group: process group that the vocabulary is split over; None for one process.
        loss_weight: [N] factor on each loss; 0 is unsupervised.
        vocab_size: vocabulary without padding.
        external: [N] each, see ``linear_objective``.
        reduce_hidden_grad: see ``linear_objective``.
        **named: see ``linear_objective``.

    Returns:
        The same as ``linear_objective``, with all statistics that the kernel can compute.
    """
    factor = torch.ones_like(labels, dtype=hidden.dtype) if loss_weight is None else loss_weight
    supervised = (labels != -100) & (factor != 0)
    if group is None:
        logits_NV = hidden @ weight[:vocab_size].t()
    else:
        if reduce_hidden_grad:
            hidden = _SumGradient.apply(hidden, group)
        shard = VocabShard.of_this_rank(weight.size(0), vocab_size, group)
        local = functional.pad(hidden @ weight[: shard.size].t(), (0, weight.size(0) - shard.size))
        logits_NV = _GatherVocabulary.apply(local, group)[:, :vocab_size]
    log_probs_NV = _log_softmax(logits_NV)
    log_prob = log_probs_NV.gather(1, labels.clamp(min=0)[:, None])[:, 0]

    with torch.no_grad():
        probs_NV = log_probs_NV.exp()
        details = {
            "entropy": torch.special.entr(probs_NV).sum(1),
            "sum_squared_prob": probs_NV.pow(2).sum(1),
            "top20_entropy": _top_entropy(probs_NV, 20),
            **_of_order(logits_NV, probs_NV, labels.clamp(min=0)[:, None]),
            "softmax_prob": probs_NV.gather(1, labels.clamp(min=0)[:, None])[:, 0],
            **join_external(external, named),
        }
    tokens = {name: vector[supervised] for name, vector in details.items()}
    output = objective(TokenStatistics(log_prob[supervised], **tokens))
    loss = log_prob.new_zeros(len(labels)).masked_scatter(
        supervised, output.loss.to(log_prob.dtype)
    )
    statistics = LinearObjectiveStatistics(
        TokenStatistics(log_prob.detach()[supervised], **tokens),
        output.weight.to(loss.dtype),
        SupervisedTokens.of(labels, loss_weight),
    )
    return LinearObjectiveOutput(loss * factor, statistics)


def _top_entropy(probs: Tensor, count: int) -> Tensor:
    """Return [N] entropy in nats of the ``count`` largest probabilities [N, V], renormalised."""
    top = probs.sort(descending=True).values[:, :count]
    return torch.special.entr(top / top.sum(-1, keepdim=True)).sum(-1)


def _of_order(logits: Tensor, probs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the rank and the lower mass [N] of the targets [N, 1] from logits and probabilities [N, V]."""
    above = logits > logits.gather(1, targets)
    return {
        "rank": 1 + above.sum(1).to(probs.dtype),
        "lower_mass": probs.masked_fill(above, 0.0).sum(1),
    }


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


class _GatherVocabulary(torch.autograd.Function):
    """Gather [N, V of this rank] into [N, V of all ranks].

    Every rank computes the same loss from the result, so the gradient of this rank's logits is its own part.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = [torch.empty_like(logits) for _ in range(group.size())]
        dist.all_gather(gathered, logits.contiguous(), group=group)
        return torch.cat(gathered, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.group.size(), 1)[ctx.group.rank()], None


class _SumGradient(torch.autograd.Function):
    """The identity, with a gradient that is summed over the group."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
