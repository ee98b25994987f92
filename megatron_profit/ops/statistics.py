"""Token statistics from hidden states and a sharded output layer, one block of the vocabulary at a time.

One small collective at the end serves all rows, however large the vocabulary. Statistics that the objective
does not ask for are not computed. The ones that compare with the target's logit take one more small product
and collective at the beginning.

Shapes: M supervised rows, v vocabulary entries of a block, H hidden, V vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_profit.objectives import TokenStatistics
from megatron_profit.ops.collectives import VocabShard
from megatron_profit.ops.kernels import BlockKernels
from megatron_profit.ops.partial_statistics import (
    MAX_LOGIT,
    PartialStatistics,
    finite_max,
    sum_of_exp,
)
from megatron_profit.ops.rows import SupervisedTokens, statistics_dtype
from megatron_profit.ops.tiling import Tiling, Workspace

# Combining takes a dozen small operations, which a GPU launches more slowly than it computes them. The
# statistics of this many blocks are small compared with one block's logits.
_PARTS_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class LinearObjectiveStatistics:
    """Statistics without a graph: of the M supervised rows, and on demand of all N rows.

    The name of a statistic is an attribute, too: [N], 0 where the row is not supervised, None where a
    kernel's statistic is not known. For example, ``statistics.log_prob`` spreads
    ``statistics.tokens.log_prob`` over all rows. Each access makes a new vector, so code that runs at each
    step takes ``tokens``.

    Attributes:
        tokens: [M] vectors of the supervised rows, in the order of the rows.
        token_weight: [M] the objective's weight, without ``loss_weight``; 0 for a token that it drops.
        rows: the supervised rows: ``rows.index`` [M] are their places among the N.
    """

    tokens: TokenStatistics
    token_weight: Tensor
    rows: SupervisedTokens

    @property
    def weight(self) -> Tensor:
        """[N] ``token_weight``; 0 where the row is not supervised."""
        return self.rows.scatter(self.token_weight)

    @property
    def supervised(self) -> Tensor:
        """[N] bool, rows with a label and a nonzero ``loss_weight``."""
        return self.rows.scatter(torch.ones_like(self.rows.index, dtype=torch.bool))

    def __getattr__(self, name: str) -> Any:
        """Return a statistic [N] by its name in ``TokenStatistics``."""
        if name.startswith("__"):  # asked for by copies, before there are any tokens
            raise AttributeError(name)
        vector = getattr(self.tokens, name)
        return None if vector is None else self.rows.scatter(vector)

    def all_rows(self) -> dict[str, Tensor]:
        """Return all known vectors [N] by name, ``weight`` and ``supervised`` among them."""
        spread = {name: self.rows.scatter(vector) for name, vector in vars(self.tokens).items()}
        return {**spread, "weight": self.weight, "supervised": self.supervised}


class LinearObjectiveOutput(NamedTuple):
    """Result of ``linear_objective``.

    Attributes:
        loss: [N] loss_weight_t * L_t in float32 (float64 for float64 inputs); exactly 0 where the
            row is not supervised.
        statistics: statistics of each token, and the weight that the objective gave it.
    """

    loss: Tensor
    statistics: LinearObjectiveStatistics


class SoftmaxNormalizer(NamedTuple):
    """All that is kept of every row's logits: softmax = exp(logit - max_logit) / sum_exp.

    These are two numbers and not the one log-sum-exp: compared with small differences of large logits, its
    rounding would be large. ``log_prob`` of the target still differs from 0 where its softmax is 1 in
    float32.
    """

    max_logit: Tensor  # [M]
    sum_exp: Tensor  # [M]
    log_prob: Tensor  # [M]


def target_logits(
    hidden_rows: Tensor, weight: Tensor, rows: SupervisedTokens, shard: VocabShard
) -> Tensor:
    """Return the logit [M] of each row's target, rounded to the input dtype and upcast, on every rank.

    Each rank multiplies the rows whose target it holds with the target's own row of the weight; one sum over
    the group joins them.

    Args:
        hidden_rows: [M, H].
        weight: [V, H].
        rows: the supervised rows.
        shard: the part of the vocabulary that this rank holds.
    """
    place = rows.targets - shard.start
    here = (place >= 0) & (place < shard.size)
    own = weight[place.masked_fill(~here, 0)]
    logits = torch.bmm(hidden_rows[:, None], own[:, :, None]).flatten()
    logits = logits.to(statistics_dtype(logits.dtype)).masked_fill(~here, 0.0)
    return shard.all_sum_(logits)


def _room_for_logits(hidden: Tensor, kept_rows: int, blocks: Sequence[slice]) -> list[Tensor]:
    """Return uninitialised logits [kept_rows, v] of each block; an empty list if no rows are kept.

    All of them are one piece of memory. The C library keeps freed pieces below 32 MB for itself, so that
    kept blocks of that size would stay in the process next to whatever the optimizer allocates.
    """
    if not kept_rows:
        return []
    widths = [block.stop - block.start for block in blocks]
    room = hidden.new_empty(kept_rows * sum(widths))
    return [
        part.view(kept_rows, -1) for part in room.split([kept_rows * width for width in widths])
    ]


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    rows: SupervisedTokens,
    shard: VocabShard,
    tiling: Tiling,
    kernels: BlockKernels,
    wanted: Set[str],
) -> tuple[SoftmaxNormalizer, dict[str, Tensor], list[Tensor]]:
    """Compute the statistics of the supervised rows over the whole vocabulary.

    Args:
        hidden: [N, H].
        weight: [V, H], padding included.
        rows: the supervised rows.
        shard: the part of the vocabulary that this rank holds.
        tiling: the blocks, and which rows' logits to keep.
        kernels: read the logits of a block.
        wanted: names from ``COMPUTED_STATISTICS``.

    Returns:
        The normalizer; ``log_prob``, ``softmax_prob`` and the wanted statistics, each [M]; and the logits
        [kept_rows, v] of each block, empty if none are to be kept.
    """
    fields, workspace = PartialStatistics.of(wanted), Workspace(hidden.device)
    hidden_rows = hidden[rows.index]
    nothing = fields.nothing(len(rows), hidden.new_empty(0, dtype=statistics_dtype(hidden.dtype)))
    target = target_logits(hidden_rows, weight, rows, shard) if fields.compares else None
    parts = [nothing[None]]
    blocks = list(tiling.blocks(shard.size)) if len(rows) else []
    kept = _room_for_logits(hidden, tiling.kept_rows, blocks)
    for number, block in enumerate(blocks):
        if tiling.kept_rows == len(rows):
            logits = torch.mm(hidden_rows, weight[block].t(), out=kept[number])
        else:
            shape = (len(rows), block.stop - block.start)
            out = workspace.buffer("logits", shape, hidden.dtype)
            logits = torch.mm(hidden_rows, weight[block].t(), out=out)
            if kept:
                kept[number].copy_(logits[: tiling.kept_rows])
        column = shard.columns(rows.targets, block)
        parts.append(kernels.statistics(logits, column, target, fields, workspace))
        if len(parts) == _PARTS_AT_ONCE:
            parts = [fields.combined(torch.cat(parts))[None]]
    total = fields.combined(shard.all_gather(fields.combined(torch.cat(parts))))
    statistics = fields.statistics(total)
    max_logit = finite_max(total[MAX_LOGIT])
    normalizer = SoftmaxNormalizer(max_logit, sum_of_exp(total), statistics["log_prob"])
    return normalizer, statistics, kept
