"""Token statistics from hidden states and a sharded output layer, one chunk of logits at a time.

Two collectives per chunk: the maximum, then one sum of everything else; one more for the largest
logits where those are wanted. What the objective does not
ask for is not computed.

Shapes: M supervised rows, n rows of a chunk, H hidden, V vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_profit.ops.collectives import VocabShard
from megatron_profit.ops.rows import SupervisedRows, chunk_logits, statistics_dtype

# What the kernel can give beside the log-probability; the other statistics come from the caller.
KERNEL_STATISTICS = frozenset({"entropy", "sum_squared_prob", "top20_entropy"})
TOP = 20


class SoftmaxNormalizer(NamedTuple):
    """All that is kept of the logits: softmax = exp(logit - max_logit) / sum_exp.

    Two numbers and not the one log-sum-exp, whose rounding would be large beside large logits.
    """

    max_logit: Tensor  # [M]
    sum_exp: Tensor  # [M]


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    rows: SupervisedRows,
    shard: VocabShard,
    wanted: Set[str],
) -> tuple[SoftmaxNormalizer, dict[str, Tensor]]:
    """Computes the statistics of the supervised rows over the whole vocabulary.

    Args:
        hidden: [N, H].
        weight: [V, H], padding included.
        rows: the supervised rows.
        shard: what of the vocabulary is here.
        wanted: names from ``KERNEL_STATISTICS``.

    Returns:
        The normalizer, and ``log_prob``, ``softmax_prob`` and the wanted statistics, each [M].
    """
    dtype = statistics_dtype(hidden.dtype)
    names = ["sum_exp", "target", *sorted(wanted - {"top20_entropy"})]
    max_logit = hidden.new_empty(len(rows), dtype=dtype)
    top20_entropy = torch.empty_like(max_logit)
    sums = hidden.new_empty(len(names), len(rows), dtype=dtype)
    for chunk in rows.chunks():
        logits = chunk_logits(hidden[rows.index[chunk]], weight[: shard.size])
        max_logit[chunk] = shard.all_max_(_row_max(logits))
        if "top20_entropy" in wanted:
            top20_entropy[chunk] = _top_entropy(logits, shard)
        partial = _vocabulary_sums(
            logits.sub_(max_logit[chunk, None]), rows.targets[chunk], shard, wanted
        )
        sums[:, chunk] = shard.all_sum_(torch.stack([partial[name] for name in names]))
    named = dict(zip(names, sums.unbind(), strict=True))
    statistics = _normalized(named)
    if "top20_entropy" in wanted:
        statistics["top20_entropy"] = top20_entropy
    return SoftmaxNormalizer(max_logit, named["sum_exp"]), statistics


def _row_max(logits: Tensor) -> Tensor:
    """[n, V] to [n]; -inf on a rank without vocabulary."""
    return logits.amax(-1) if logits.size(1) else logits.new_full(logits.shape[:1], -torch.inf)


def _top_entropy(logits: Tensor, shard: VocabShard) -> Tensor:
    """Entropy [n] of the softmax over the 20 largest logits of the whole vocabulary.

    These are among the 20 largest of each rank, so that 20 numbers per row and rank decide.
    """
    top = logits.new_full((logits.size(0), TOP), -torch.inf)
    here = min(TOP, logits.size(1))
    top[:, :here] = logits.topk(here, sorted=False).values
    candidates = shard.all_gather(top).movedim(0, 1).flatten(1)
    probs = candidates.topk(TOP, sorted=False).values.softmax(-1)
    return torch.special.entr(probs).sum(-1)


def _vocabulary_sums(
    shifted: Tensor, targets: Tensor, shard: VocabShard, wanted: Set[str]
) -> dict[str, Tensor]:
    """Sums over this rank's vocabulary, each [n]; overwrites ``shifted`` = logits - max [n, V]."""
    sums = {"target": _target_logit(shifted, targets, shard)}
    exp = shifted.exp() if "entropy" in wanted else shifted.exp_()
    sums["sum_exp"] = exp.sum(-1)
    if "entropy" in wanted:
        # A logit of -inf has probability 0 and adds nothing; 0 * -inf would be NaN.
        shifted.clamp_(min=torch.finfo(shifted.dtype).min)
        sums["entropy"] = shifted.mul_(exp).sum(-1)
    if "sum_squared_prob" in wanted:
        sums["sum_squared_prob"] = exp.square_().sum(-1)
    return sums


def _target_logit(shifted: Tensor, targets: Tensor, shard: VocabShard) -> Tensor:
    """[n] shifted logit of the target, 0 where another rank holds it."""
    if not shard.size:
        return shifted.new_zeros(targets.shape)
    row, here = shard.locate(targets)
    return shifted.gather(1, row[:, None]).squeeze(1).masked_fill(~here, 0.0)


def _normalized(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Statistics from sums over the whole vocabulary, all [M]."""
    sum_exp, target = sums["sum_exp"], sums["target"]
    log_sum = sum_exp.log()
    statistics = {"log_prob": target - log_sum, "softmax_prob": target.exp() / sum_exp}
    if "entropy" in sums:
        statistics["entropy"] = log_sum - sums["entropy"] / sum_exp
    if "sum_squared_prob" in sums:
        statistics["sum_squared_prob"] = sums["sum_squared_prob"] / sum_exp.square()
    return statistics
