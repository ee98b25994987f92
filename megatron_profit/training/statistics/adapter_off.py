"""The log-probabilities of the frozen base of adapters, as a reference model.

With its adapters off, the model is the base. So the reference needs no second copy of weights and no file:
one more forward pass of each step's rows gives its log-probabilities.
"""

from __future__ import annotations

from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_profit.megatron_patches.callbacks import TrainContext
from megatron_profit.models.lora.transform import adapters_off
from megatron_profit.objectives import Objective
from megatron_profit.training.statistics.external_statistics import StatisticProvider
from megatron_profit.training.statistics.lookahead_pass import LookaheadPass, values_in
from megatron_profit.training.statistics.token_table import TokenTable
from megatron_profit.training.step.batch import Batch
from megatron_profit.training.step.objective_loss import ObjectiveLoss


class AdapterOffReference(StatisticProvider):
    """Gives `ref_log_prob` of the frozen base, or another statistic of it.

    Args:
        loss: The loss of the run; a warm-up of plain SFT in it needs no pass.
        lookahead_pass: Sees the rows of the run.
        computed: The statistic of the kernel; it is given under the name `ref_` and its own.
    """

    statistic = "ref_log_prob"

    def __init__(
        self, loss: ObjectiveLoss, lookahead_pass: LookaheadPass, computed: str = "log_prob"
    ) -> None:
        self.statistic = f"ref_{computed}"
        self._loss, self._lookahead_pass, self._computed = loss, lookahead_pass, computed
        self._wanted = frozenset({computed})
        self._train: TokenTable | None = None
        self._valid: TokenTable | None = None

    def before_train_step(self, context: TrainContext, iteration: int) -> None:
        if not self._is_read_by(self._loss.current_objective):
            return
        with adapters_off(unwrap_model(context.model)):
            self._train = self._lookahead_pass.of_next_batches(context, 1, self._wanted)

    def before_evaluation(self, context: TrainContext) -> None:
        if not self._is_read_by(self._loss.current_objective.for_evaluation()):
            return
        with adapters_off(unwrap_model(context.model)):
            tables = self._lookahead_pass.of_valid_batches(context, self._wanted)
        found = [table for table in tables if table is not None]
        self._valid = TokenTable.joined(found) if found else None

    def _is_read_by(self, objective: Objective) -> bool:
        return self.statistic in objective.needed_statistics | self._loss.logged_statistics

    def of(self, batch: Batch, data: str) -> Tensor | None:
        """Return [B, S] of a micro-batch; None on pipeline stages that compute no loss."""
        table = self._train if data == "train" else self._valid
        return values_in(table, self._computed, batch)
