"""Statistics that follow from a whole global batch, for example which tokens are its top share.

Before each step, a forward-only pass computes the statistics that the objective looks ahead at, for every
supervised token of the coming global batch. They are gathered from all ranks, and the objective decides on
each. Only the rounding of the statistics makes the result depend on the layout.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from megatron_profit.megatron_patches.callbacks import TrainContext
from megatron_profit.objectives import Objective, TokenStatistics
from megatron_profit.training.statistics.external_statistics import StatisticProvider
from megatron_profit.training.statistics.lookahead_pass import LookaheadPass, data_group, values_in
from megatron_profit.training.statistics.token_table import TokenTable, draw_of
from megatron_profit.training.step.batch import Batch
from megatron_profit.training.step.objective_loss import ObjectiveLoss


class Lookahead(StatisticProvider):
    """Gives a statistic of `Objective.lookahead`. An evaluation looks at each of its own global batches.

    One pass decides all statistics of a step: the first object makes it, and the others share its tables.

    Args:
        statistic: The statistic.
        loss: The loss of the run; a warm-up of plain SFT in it looks at none.
        lookahead_pass: Sees the rows of the run.
        first: The object that makes the pass for this one; None where it makes it.
    """

    def __init__(
        self,
        statistic: str,
        loss: ObjectiveLoss,
        lookahead_pass: LookaheadPass,
        first: Lookahead | None = None,
    ) -> None:
        self.statistic, self._loss, self._lookahead_pass = statistic, loss, lookahead_pass
        self._shares = first is not None
        self._tables: dict[str, TokenTable | None] = {} if first is None else first._tables

    @classmethod
    def of_all(cls, loss: ObjectiveLoss, lookahead_pass: LookaheadPass) -> list[Lookahead]:
        """Return an object for each statistic that the objective of a loss looks ahead for."""
        found: list[Lookahead] = []
        for statistic in loss.objective.lookahead:
            found.append(cls(statistic, loss, lookahead_pass, found[0] if found else None))
        return found

    def before_train_step(self, context: TrainContext, iteration: int) -> None:
        objective = self._loss.current_objective
        if objective.lookahead and not self._shares:
            seen = self._lookahead_pass.of_next_batches(context, 1, _reads(objective))
            self._tables["train"] = _decided([seen], objective)

    def before_evaluation(self, context: TrainContext) -> None:
        objective = self._loss.current_objective.for_evaluation()
        if objective.lookahead and not self._shares:
            seen = self._lookahead_pass.of_valid_batches(context, _reads(objective))
            self._tables["valid"] = _decided(seen, objective)

    def of(self, batch: Batch, data: str) -> Tensor | None:
        """Return [B, S]; None where no loss is computed."""
        return values_in(self._tables.get(data), self.statistic, batch)


def _reads(objective: Objective) -> frozenset[str]:
    """Return the names of the statistics that the pass computes."""
    return frozenset({"log_prob"}).union(*objective.lookahead.values())


def _decided(seen: Iterable[TokenTable | None], objective: Objective) -> TokenTable | None:
    """Return the statistics for several global batches, of which each rank saw a part. A collective."""
    decided = []
    for part in seen:
        if part is None:
            return None
        # Tokens are in the order of their keys, so that ties are broken alike at any layout, and the tokens
        # of a record stand together.
        whole = part.gathered(data_group())
        tokens = TokenStatistics(**whole.statistics, record=draw_of(whole.keys))
        decided.append(TokenTable(whole.keys, objective.look_ahead(tokens)))
    return TokenTable.joined(decided)
