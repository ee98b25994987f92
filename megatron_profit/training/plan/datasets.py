"""From the files of the command line to the data sets that Megatron's data loaders read."""

from __future__ import annotations

import hashlib
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from megatron.core.datasets.utils import Split

from megatron_profit.data import (
    DataOptions,
    PackingReport,
    SFTDataset,
    TokenizedData,
    build_sets,
    load_tokenizer,
)
from megatron_profit.data.render.template import check_vocabulary
from megatron_profit.training.arguments.derive import RunSettings
from megatron_profit.training.arguments.length import batch_schedule, batch_size_changes
from megatron_profit.training.process.console import print_rank_0, warn_rank_0


@dataclass(frozen=True)
class SFTData:
    """The rows of one run.

    Every rank maps the same examples and draws the same order from (seed, row). So no data is broadcast, and
    a resumed run continues with the row at which it stopped.

    Attributes:
        train, valid: The rows.
        supervised_share: Supervised tokens divided by all predicted tokens, in an epoch.
        train_prepared, valid_prepared: The prepared records of the rows.
        digest: A hash of the training records, their order and their rows.
    """

    train: SFTDataset
    valid: SFTDataset | None
    supervised_share: float
    train_prepared: TokenizedData
    valid_prepared: TokenizedData | None = None
    digest: str = ""

    @property
    def contents(self) -> dict[str, tuple[str, int]]:
        """A hash of the tokenised examples of each data set, and their number, by its flag."""
        found = {"--data": (self.digest, len(self.train_prepared.digests))}
        if (valid := self.valid_prepared) is not None:
            digest = hashlib.sha256(np.ascontiguousarray(valid.digests).data)
            found["--valid-data"] = (digest.hexdigest(), len(valid.digests))
        return found

    @property
    def turn_end(self) -> int | None:
        """Id of the token that ends a turn; None where the chat template ends it in ordinary text."""
        return self.train_prepared.report.turn_end_id

    @property
    def valid_rows(self) -> int:
        """Rows that hold each validation record once."""
        return 0 if self.valid is None else self.valid.order.rows_until(1)

    def provider(self, args: Namespace) -> Callable:
        """Return Megatron's `train_valid_test_datasets_provider`."""

        def provide(num_samples: tuple[int, int, int], vp_stage: int | None = None) -> tuple:
            # One batch more than is drawn: Megatron's sampler refuses a run that is started again after its
            # last step, although no step is left. And the last batch may take more rows than are left.
            train = self.train.with_samples(
                _train_rows(args, num_samples[0]) + _largest_batch(args)
            )
            train.split = Split.train
            if self.valid is None or args.eval_iters == 0:
                return train, None, None
            period = args.eval_iters * args.eval_global_batch_size
            # Includes the rows of earlier evaluations, which may have been larger or more frequent.
            rows = args.consumed_valid_samples + num_samples[1] + period
            valid = self.valid.with_samples(rows, period)
            valid.split = Split.valid
            return train, valid, None

        provide.is_distributed = True  # type: ignore[attr-defined]
        return provide


def _train_rows(args: Namespace, counted: int) -> int:
    """Return the rows up to the last step.

    Megatron has `counted` them as if all batches had the size of now.
    """
    left = max(args.train_iters - args.iteration, 0)
    return max(counted, args.consumed_train_samples + left * args.global_batch_size)


def _largest_batch(args: Namespace) -> int:
    """Return the rows of the largest step. In a schedule it is the last one: batches only grow."""
    if args.step_batch_size_schedule is None:
        return args.global_batch_size
    return batch_schedule(args.step_batch_size_schedule, args.seq_length)[-1][1]


def build_datasets(settings: RunSettings, options: DataOptions) -> SFTData:
    """Map the prepared examples of the run, and report the records that were left out.

    The first process of a machine prepares data that are not in the cache. The others wait for its files.

    Args:
        settings: The settings of the run.
        options: The options of the data flags.

    Raises:
        DataError: Data cannot be read, or no example can be trained.
    """
    leader = os.environ.get("LOCAL_RANK", "0") == "0"
    if leader:
        folder = settings.hf_model
        check_vocabulary(folder, len(load_tokenizer(folder)), settings.values["vocab_size"])
    sets = build_sets(
        options,
        settings.hf_model,
        epochs=settings.values["epochs"],
        leader=leader,
        progress=print_rank_0,
    )
    train, valid = sets["train"], sets.get("valid")
    print_rank_0(f"> train data: {train.prepared.report}\n{train.packing}")
    changes = batch_size_changes(settings.values)
    _tell_of_steps(train.packing, None if changes else settings.batch_size)
    if valid and valid.prepared is train.prepared:
        print_rank_0(f"> valid data, set aside of the records above: {valid.packing}")
    elif valid:
        print_rank_0(f"> valid data: {valid.prepared.report}\n{valid.packing}")
    return SFTData(
        train.dataset,
        None if valid is None else valid.dataset,
        train.packing.supervised_share,
        train.prepared,
        None if valid is None else valid.prepared,
        _digest(train.prepared, options),
    )


def _tell_of_steps(rows: PackingReport, batch_size: int | None) -> None:
    """Print how many tokens a step of `batch_size` rows trains, and warn if row or step size looks like a
    mistake. None stands for steps of several sizes.
    """
    if batch_size is not None:
        print_rank_0(rows.of_step(batch_size))
    if rows.warning is not None:
        warn_rank_0(rows.warning)
    if batch_size is not None and rows.rows < batch_size:
        shorter = " or a shorter --seq-length" if rows.rows < rows.examples else ""
        warn_rank_0(
            f"an epoch has {rows.rows:,} rows, fewer than the {batch_size:,} of a step: give a "
            f"smaller --global-batch-size{shorter}"
        )


def _digest(prepared: TokenizedData, options: DataOptions) -> str:
    """Return a hash of the records in each row of the training data, and of the tokens trained in them."""
    form = (options.seed, options.packing, options.preparation, options.valid_split)
    weights = [(source.weight, source.num_samples) for source in options.train]
    digest = hashlib.sha256(repr((form, weights, prepared.report.supervised_tokens)).encode())
    digest.update(np.ascontiguousarray(prepared.digests).data)
    return digest.hexdigest()[:24]
