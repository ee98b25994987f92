"""Objectives that train the top share of the tokens by a score."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from megatron_profit.objectives.base import (
    Objective,
    ObjectiveOutput,
    TokenStatistics,
    option,
    weighted_nll,
)
from megatron_profit.objectives.checks import number_in, one_of

if TYPE_CHECKING:
    from torch import Tensor

RANK_SCOPES = ("micro_batch", "global_batch")


def top_share(score: Tensor, share: float) -> Tensor:
    """Return [N] bool: the ``kept_count(share, N)`` entries of highest score.

    Among equal scores the earlier position is kept. For example, scores 3, 1, 3, 2 with share 0.25 keep the
    first position only. A NaN counts as the highest, so that it shows.
    """
    import torch

    kept = torch.zeros_like(score, dtype=torch.bool)
    order = score.detach().sort(descending=True, stable=True).indices
    kept[order[: kept_count(share, score.numel())]] = True
    return kept


def kept_count(share: float, num_tokens: int) -> int:
    """Return ceil(share * num_tokens), with the share as it is written.

    For example, 0.07 of 100 tokens are 7. In floating point the product is 7.000000000000001.
    """
    return math.ceil(Fraction(repr(share)) * num_tokens)


@dataclass(frozen=True)
class RankedObjective(Objective):
    """L_t = -M_t log p_t with M_t = 1 on the ceil(keep_fraction * n) tokens of highest score; weight M_t.

    Under the scope ``micro_batch`` the n tokens are one call's, so the mask depends on how a global batch is
    split. Under ``global_batch`` whoever sees the whole batch computes the ``score_statistics`` of all its
    tokens, calls ``look_ahead`` with them, and passes the statistic ``selected``: the same mask for any
    layout.

    Attributes:
        keep_fraction: share of the supervised tokens that is trained, in (0, 1].
        rank_scope: micro_batch or global_batch.

    Raises:
        ValueError: a value out of range.
    """

    normalization: ClassVar[str] = "kept"

    keep_fraction: float = option(
        "share of the supervised tokens that is trained, in (0, 1]", default=1.0, type=float
    )
    rank_scope: str = option(
        "rank the tokens of each micro-batch of each rank (micro_batch), or of the whole "
        "global batch (global_batch), which costs one more forward pass",
        default="micro_batch",
        choices=RANK_SCOPES,
    )

    def __post_init__(self) -> None:
        share = number_in("keep_fraction", self.keep_fraction, 0, 1, low_open=True)
        object.__setattr__(self, "keep_fraction", share)
        one_of("rank_scope", self.rank_scope, RANK_SCOPES)

    @property
    @abstractmethod
    def score_statistics(self) -> frozenset[str]:
        """Names of the statistics that ``score`` reads."""

    @abstractmethod
    def score(self, statistics: TokenStatistics) -> Tensor:
        """Return [N] the score of each token; the highest are kept."""

    @property
    def required_statistics(self) -> frozenset[str]:
        if self.rank_scope == "global_batch":
            return frozenset({"selected"})
        return self.score_statistics

    @property
    def lookahead(self) -> Mapping[str, frozenset[str]]:
        return {"selected": self.score_statistics} if self.rank_scope == "global_batch" else {}

    def look_ahead(self, statistics: TokenStatistics) -> Mapping[str, Tensor]:
        """Return ``selected``: the top share of the tokens by their score."""
        return {
            name: top_share(self.score(statistics), self.keep_fraction) for name in self.lookahead
        }

    def evaluate(self, statistics: TokenStatistics) -> ObjectiveOutput:
        if self.rank_scope == "micro_batch":
            return weighted_nll(top_share(self.score(statistics), self.keep_fraction), statistics)
        import torch

        if statistics.selected.dtype != torch.bool:
            raise ValueError(f"selected is {statistics.selected.dtype}; pass a mask of torch.bool.")
        return weighted_nll(statistics.selected, statistics)
