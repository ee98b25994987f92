"""The selection of tokens by their rank in a whole global batch.

Before each step, a forward-only pass scores every supervised token of the coming global batch. The scores of
all ranks are gathered and ranked. Only the rounding of the scores makes the mask depend on the layout.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.training import get_args
from torch import Tensor

from megatron_profit.megatron_patches.callbacks import TrainContext
from megatron_profit.objectives import RankedObjective, TokenStatistics, top_share
from megatron_profit.training.statistics.given_statistics import StatisticProvider
from megatron_profit.training.statistics.score_pass import ScorePass, data_group, keys_of
from megatron_profit.training.statistics.token_table import TokenTable
from megatron_profit.training.step.batch import Batch
from megatron_profit.training.step.objective_loss import ObjectiveLoss


class GlobalRanking(StatisticProvider):
    """Gives `selected` for objectives that rank over the global batch.

    An evaluation ranks each of its own global batches.

    Args:
        loss: The loss of the run; a warm-up of plain SFT in it is not ranked.
        score_pass: Sees the rows of the run.
    """

    statistic = "selected"

    def __init__(self, loss: ObjectiveLoss, score_pass: ScorePass) -> None:
        self._loss, self._score_pass = loss, score_pass
        self._train: TokenTable | None = None
        self._valid: TokenTable | None = None

    def before_train_step(self, context: TrainContext, iteration: int) -> None:
        objective = self._loss.current_objective
        if isinstance(objective, RankedObjective):
            wanted = objective.score_statistics | {"log_prob"}
            scored = self._score_pass.of_next_batches(context, 1, wanted)
            self._train = _selected([scored], objective)

    def before_evaluation(self, context: TrainContext) -> None:
        objective = self._loss.current_objective
        if isinstance(objective, RankedObjective):
            wanted = objective.score_statistics | {"log_prob"}
            batches = range(get_args().eval_iters)
            scored = [self._score_pass.of_valid_batch(context, b, wanted) for b in batches]
            self._valid = _selected(scored, objective)

    def of(self, batch: Batch) -> Tensor | None:
        """Return [B, S] bool; None where no loss is computed."""
        table = self._train if torch.is_grad_enabled() else self._valid
        if table is None:
            return None
        return table.look_up(self.statistic, keys_of(batch), batch.labels != -100)


def _selected(scored: Iterable[TokenTable | None], objective: RankedObjective) -> TokenTable | None:
    """Return the mask of each of several global batches, of which each rank scored a part. A collective."""
    selected = []
    for part in scored:
        if part is None:
            return None
        score = objective.score(TokenStatistics(**part.statistics))
        whole = TokenTable(part.keys, {"score": score}).gathered(data_group())
        # Tokens are in the order of their keys, so that ties are broken alike at any layout.
        kept = top_share(whole.statistics["score"], objective.keep_share)
        selected.append(TokenTable(whole.keys, {GlobalRanking.statistic: kept}))
    return TokenTable.joined(selected)
