"""The objective on dense logits with plain autograd: what ``linear_objective`` must equal.

Written for reading and for tests: one process, the whole vocabulary, all logits at once. It shares
nothing with the kernel, and its gradient comes from the objective's loss, not from its weight.

Shape suffixes: N tokens, M supervised rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_profit.objectives import Objective, TokenStatistics
from megatron_profit.ops.linear_objective import LinearObjectiveOutput, LinearObjectiveStatistics


def reference_linear_objective(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    objective: Objective,
    *,
    loss_weight: Tensor | None = None,
    vocab_size: int | None = None,
    ref_log_prob: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    uniform: Tensor | None = None,
    selected: Tensor | None = None,
) -> LinearObjectiveOutput:
    """Computes the loss of each token and its statistics, all of them, on dense logits.

    Args:
        hidden: [N, H]; float64 makes an oracle, float16 or bfloat16 the usual half-precision loss
            (logits in the input dtype, log-softmax in float32).
        weight: [V, H], the whole vocabulary.
        labels: [N] int64; -100 is unsupervised.
        objective: gives the loss.
        loss_weight: [N] factor on each loss; 0 is unsupervised.
        vocab_size: vocabulary without padding.
        ref_log_prob: [N], see ``linear_objective``.
        old_log_prob: [N], see ``linear_objective``.
        uniform: [N], see ``linear_objective``.
        selected: [N], see ``linear_objective``.

    Returns:
        As ``linear_objective``; a statistic is 0 in rows that are not supervised.
    """
    factor = torch.ones_like(labels, dtype=hidden.dtype) if loss_weight is None else loss_weight
    supervised = (labels != -100) & (factor != 0)
    log_probs_NV = dense_log_probs(hidden, weight[:vocab_size])
    log_prob = log_probs_NV.gather(1, labels.clamp(min=0)[:, None])[:, 0]

    with torch.no_grad():
        probs_NV = log_probs_NV.exp()
        details = {
            "entropy": torch.special.entr(probs_NV).sum(1),
            "sum_squared_prob": probs_NV.pow(2).sum(1),
            "top20_entropy": _top_entropy(probs_NV, 20),
            "softmax_prob": probs_NV.gather(1, labels.clamp(min=0)[:, None])[:, 0],
            "ref_log_prob": ref_log_prob,
            "old_log_prob": old_log_prob,
            "uniform": uniform,
            "selected": selected,
        }
    given = {name: vector for name, vector in details.items() if vector is not None}
    output = objective(
        TokenStatistics(
            log_prob=log_prob[supervised], **{name: v[supervised] for name, v in given.items()}
        )
    )
    loss = log_prob.new_zeros(len(labels)).masked_scatter(
        supervised, output.loss.to(log_prob.dtype)
    )
    statistics = LinearObjectiveStatistics(
        log_prob=log_prob.detach().where(supervised, 0.0),
        **{name: vector.masked_fill(~supervised, 0) for name, vector in given.items()},
        weight=torch.zeros_like(loss).masked_scatter(supervised, output.weight.to(loss.dtype)),
        supervised=supervised,
    )
    return LinearObjectiveOutput(loss * factor, statistics)


def _top_entropy(probs: Tensor, count: int) -> Tensor:
    """[N] entropy in nats of the ``count`` largest probabilities [N, V], renormalised."""
    top = probs.sort(descending=True).values[:, :count]
    return torch.special.entr(top / top.sum(-1, keepdim=True)).sum(-1)


def dense_log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
    """[N, V] log-probabilities in nats; half-precision logits are upcast to float32."""
    logits_NV = hidden @ weight.t()
    return logits_NV.to(torch.promote_types(hidden.dtype, torch.float32)).log_softmax(-1)
