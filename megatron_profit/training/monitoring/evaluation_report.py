"""The token report of some validation records, written at each evaluation.

The evaluation computes the statistics anyway. Each rank of the last pipeline stage collects the tokens of the
chosen records in its micro-batches. When an evaluation ends, one rank writes the page. A prompt's tokens have
no probability in it, because they never meet the output layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from transformers import PreTrainedTokenizerBase

from checkpoint_conversion.engine.output import whole_file
from checkpoint_conversion.errors import warn
from megatron_profit.data import SFTDataset, TokenizedData
from megatron_profit.megatron_patches.callbacks import Callback
from megatron_profit.megatron_patches.enduring import reason
from megatron_profit.objectives import Objective, TokenStatistics
from megatron_profit.token_report import TokenRecord, page, slider_start, token_texts
from megatron_profit.training.process.console import print_rank_0
from megatron_profit.training.process.ranks import is_first_rank
from megatron_profit.training.step.batch import Batch
from megatron_profit.training.step.objective_loss import (
    MicroBatchLoss,
    current_step,
    micro_batches_of_window,
)

# A folder next to the pages, for pages of steps that are trained again.
_SUPERSEDED = "superseded"
# Columns of the statistics collected for a token; the last one only where the evaluation has it.
_RECORD, _POSITION, _LOG_PROB, _PROB, _WEIGHT, _REF_LOG_PROB = range(6)


@dataclass
class EvaluationReport(Callback):
    """Collects and writes.

    Attributes:
        folder: Gets a page `step_0000100.html` for each evaluation.
        records: Index in the prepared data of each record to show.
        prepared: The validation data.
        tokenizer: The model's tokenizer.
    """

    folder: Path
    records: Sequence[int]
    prepared: TokenizedData
    tokenizer: PreTrainedTokenizerBase
    _collected: list[torch.Tensor] = field(default_factory=list, repr=False)
    _micro_batches: int = 0
    _failed: bool = False

    def before_training(self, iteration: int) -> None:
        """Set aside the pages of later steps, which an earlier process or another run has written."""
        if is_first_rank():
            self._endure(lambda: _back_up(self.folder, iteration))

    def _endure(self, write: Callable[[], None]) -> None:
        """Call `write`, and report only its first failure: a report must never end the run."""
        try:
            write()
        except OSError as error:
            if not self._failed:
                warn(f"--token-report {self.folder} cannot be written ({reason(error)})")
            self._failed = True

    def observe(self, batch: Batch, loss: MicroBatchLoss) -> None:
        """Collect a micro-batch of an evaluation, and write the page after the last one.

        Ranks that differ only in their data call this together.
        """
        if torch.is_grad_enabled():
            return
        self._collected.append(self._tokens(batch, loss))
        self._micro_batches += 1
        if self._micro_batches < micro_batches_of_window():
            return
        group = mpu.get_data_parallel_group(with_context_parallel=True)
        everything: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(everything, torch.cat(self._collected), group)
        self._collected, self._micro_batches = [], 0
        if mpu.get_tensor_model_parallel_rank() == 0 and group.rank() == 0:
            tokens, steps = torch.cat(everything), current_step() + 1
            self._endure(lambda: self._write(tokens, loss.objective, steps))

    def _tokens(self, batch: Batch, loss: MicroBatchLoss) -> torch.Tensor:
        """Return [tokens, columns] float64, the supervised tokens of the chosen records."""
        statistics = loss.statistics
        record, position = (
            statistics.rows.take(index.transpose(0, 1).flatten())
            for index in (batch.example_index, batch.position_ids)
        )
        here = torch.isin(record, torch.tensor(self.records, device=record.device))
        tokens = statistics.tokens
        columns = [record, position, tokens.log_prob, tokens.prob, statistics.token_weight]
        if (of_reference := tokens.external.get("ref_log_prob")) is not None:
            columns.append(of_reference)
        return torch.stack([column[here].double() for column in columns], 1).cpu()

    def _write(self, tokens: torch.Tensor, objective: Objective, steps: int) -> None:
        of_record = (tokens[tokens[:, _RECORD] == i] for i in self.records)
        text = page(
            [
                self._record(i, part, objective.name)
                for i, part in zip(self.records, of_record, strict=True)
            ],
            title=f"Token report after step {steps}",
            subtitle=f"{len(self.records)} validation records under the model in training; the objective "
            f"is {objective.name}. Tokens of a prompt have no probability here.",
            **slider_start([objective]),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / f"step_{steps:07}.html") as stream:
            stream.write(text.encode())

    def _record(self, index: int, tokens: torch.Tensor, objective: str) -> TokenRecord:
        ids = self.prepared.examples[index][0].tolist()
        # The prediction at a position of the row is for the next token.
        place = tokens[:, _POSITION].long() + 1
        nothing = torch.full((len(ids),), torch.nan)
        spread = [nothing.index_copy(0, place, column) for column in tokens.float().unbind(1)]
        prob, has_reference = spread[_PROB], len(spread) > _REF_LOG_PROB
        weight = torch.zeros(len(ids)).index_copy(0, place, tokens[:, _WEIGHT].float())
        return TokenRecord(
            name=self.prepared.name(index),
            pieces=token_texts(self.tokenizer, ids),
            supervised=~prob.isnan(),
            statistics=TokenStatistics(
                spread[_LOG_PROB],
                softmax_prob=prob,
                ref_log_prob=spread[_REF_LOG_PROB] if has_reference else None,
            ),
            weights={objective: weight},
        )


def _back_up(folder: Path, step: int) -> None:
    pages = ((file, file.stem.removeprefix("step_")) for file in folder.glob("step_*.html"))
    later = [file for file, number in pages if number.isdecimal() and int(number) > step]
    if later:
        (folder / _SUPERSEDED).mkdir(exist_ok=True)
        print_rank_0(f"> reports of later steps are moved to {folder / _SUPERSEDED}")
    for file in later:
        file.replace(folder / _SUPERSEDED / file.name)


def first_records(dataset: SFTDataset, count: int, evaluated_rows: int) -> tuple[int, ...]:
    """Return the records that an evaluation of this many rows meets first, at most `count`."""
    found: dict[int, None] = {}
    rows = min(dataset.order.rows_until(1), evaluated_rows)
    dataset = dataset.with_samples(rows)
    for row in range(rows):
        found |= dict.fromkeys(i for i in dataset[row]["example_index"].tolist() if i >= 0)
        if len(found) >= count:
            break
    return tuple(sorted(list(found)[:count]))
