"""The options of the data flags, and the data sets made from them; shared by training and tools."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_profit.data.chat.conversations import is_read, normalise
from megatron_profit.data.errors import BrokenRecord, DataError, shown
from megatron_profit.data.files.records import read_records
from megatron_profit.data.files.sources import DataSource, read_sources, refuse_unused
from megatron_profit.data.files.splits import VALID_SPLITS
from megatron_profit.data.render.renderer import SupervisionPolicy
from megatron_profit.data.render.template_date import parse_day
from megatron_profit.data.sequences.dataset import SFTDataset
from megatron_profit.data.sequences.order import Group
from megatron_profit.data.sequences.report import PackingReport
from megatron_profit.data.store.cache import default_cache, load_or_build
from megatron_profit.data.store.examples import TokenizedData
from megatron_profit.data.store.prepare import Preparation

# Validation rows are shuffled, so that the first of them (--eval-iters) are a sample of all: packing puts
# the longest records first. The order is the same in every run.
_VALID_SEED = 0
# Limits of --data-workers, for machines with few cores and with many.
_FEWEST_LIMIT, _WORKERS_PER_CORE = 64, 4
# Examples of an epoch, 40 bytes each while rows are laid out.
_MOST_DRAWN = 2**31


@dataclass(frozen=True)
class DataOptions:
    """The options of the data flags.

    Attributes:
        train, valid: Sources; `valid` may be empty.
        valid_split: Share of the records of `train` to evaluate on, 0 for none.
        preparation: The settings with which records become examples.
        packing: Several records to a row.
        seed: Seed of the order of the rows.
        workers: Processes that prepare, None for as many as the data are worth.
        cache: Folder for prepared data.
    """

    train: tuple[DataSource, ...]
    valid: tuple[DataSource, ...]
    valid_split: float
    preparation: Preparation
    packing: bool
    seed: int
    workers: int | None
    cache: Path

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> DataOptions:
        """Return the options of parsed flags: the flags of `add_data_flags`, `seq_length` and `seed`.

        Raises:
            DataError: A flag is out of range, or contradicts another.
        """
        share, workers = flags["valid_split"] or 0.0, flags["data_workers"]
        if not 0 <= share < 1:
            raise DataError(f"--valid-split is {share}; it must be at least 0 and below 1")
        if share and flags["valid_data"]:
            raise DataError("--valid-split and --valid-data contradict each other; drop one")
        if workers is not None and not 1 <= workers <= _most_workers():
            raise DataError(
                f"--data-workers is {workers}; it must be in 1..{_most_workers()} on this machine"
            )
        naming = {"columns": flags["data_columns"] or (), "dataset_info": flags["dataset_info"]}
        training = SupervisionPolicy(flags["train_on"], flags["train_think"])
        train = read_sources(flags["data"], weights=flags["data_weights"] or (), **naming)
        valid = read_sources(flags["valid_data"] or (), split=VALID_SPLITS, **naming)
        refuse_unused([*flags["data"], *(flags["valid_data"] or ())], **naming)
        return cls(
            train=train,
            valid=valid,
            valid_split=share,
            preparation=Preparation(
                flags["seq_length"],
                flags["too_long"],
                training,
                parse_day(flags["template_date"]),
                tuple(flags["allow_special_tokens"] or ()),
            ),
            packing=flags["packing"],
            seed=flags["seed"],
            workers=workers,
            cache=Path(os.path.expanduser(flags["data_cache"]))
            if flags["data_cache"]
            else default_cache(),
        )


def check_first_records(options: DataOptions) -> None:
    """Refuse data that are missing, or whose first record tells no known format; nothing else is read.

    Raises:
        DataError: Names the file, and the remedy.
    """
    for source in (*options.train, *options.valid):
        records = read_records(source.path, source.split, is_read(source.layout))
        for record in itertools.islice(records, 1):
            with contextlib.suppress(BrokenRecord):  # it will be left out and counted
                normalise(record, source.layout)


@dataclass(frozen=True)
class BuiltSet:
    """One of the data sets of a run.

    Attributes:
        prepared: The examples, and the report on the records.
        dataset: Its rows.
        packing: Report on how full the rows are.
    """

    prepared: TokenizedData
    dataset: SFTDataset
    packing: PackingReport


def _most_workers() -> int:
    """Return the number of processes above which more of them only take memory."""
    return max(_FEWEST_LIMIT, _WORKERS_PER_CORE * (os.cpu_count() or 1))


def build_sets(
    options: DataOptions,
    tokenizer: Path,
    *,
    epochs: int | None = None,
    leader: bool = True,
    progress: Callable[[str], None] | None = None,
) -> dict[str, BuiltSet]:
    """Return the data sets "train" and, where there is one, "valid", of 0 rows each (see `with_samples`).

    Args:
        options: The options of the flags.
        tokenizer: Folder of the tokenizer.
        epochs: Training rows after this many epochs have no label; None for epochs without end.
        leader: Whether this process prepares data that are not in the cache; the others wait for it.
        progress: Called with lines of text.

    Raises:
        DataError: The data cannot be used.
    """

    def prepared_of(sources: tuple[DataSource, ...]) -> TokenizedData:
        return load_or_build(
            *(sources, tokenizer, options.preparation, options.cache),
            leader=leader,
            workers=options.workers,
            progress=progress,
        )

    train = prepared_of(options.train)
    groups = _groups(train, options.train)
    chosen = np.concatenate([group.examples for group in groups])
    aside = _set_aside(train.digests, chosen, options.valid_split)
    groups = [replace(group, examples=group.examples[~aside[group.examples]]) for group in groups]
    _check_drawn(groups)
    sets = {"train": _rows(train, options, groups, seed=options.seed, epochs=epochs)}
    if options.valid:
        valid = prepared_of(options.valid)
        groups = _groups(valid, options.valid)
        _check_drawn(groups)
        sets["valid"] = _rows(valid, options, groups, seed=_VALID_SEED)
    elif options.valid_split:
        held_out = [Group(np.flatnonzero(aside))]
        sets["valid"] = _rows(train, options, held_out, seed=_VALID_SEED)
    return sets


def _rows(
    prepared: TokenizedData,
    options: DataOptions,
    groups: list[Group],
    *,
    seed: int,
    epochs: int | None = None,
) -> BuiltSet:
    seq_length = options.preparation.seq_length
    dataset = SFTDataset(
        prepared.examples,
        seq_length,
        0,
        seed=seed,
        packing=options.packing,
        groups=groups,
        epochs=epochs,
    )
    positions, labels = prepared.examples.positions, prepared.labels
    packing = PackingReport.of(dataset.order, positions, labels, seq_length)
    return BuiltSet(prepared, dataset, packing)


def _groups(prepared: TokenizedData, sources: tuple[DataSource, ...]) -> list[Group]:
    """Return the groups to draw from, one for each source: all examples, or as many as `num_samples` says.

    If a source has fewer, some examples come more than once.
    """
    groups = []
    for number, source in enumerate(sources):
        examples, weight = np.flatnonzero(prepared.sources == number), Fraction(str(source.weight))
        wanted = source.num_samples
        if wanted is not None and wanted < len(examples):
            first = np.argsort(prepared.digests[examples], kind="stable")[:wanted]
            examples = np.sort(examples[first])
        elif wanted is not None and len(examples):
            weight *= Fraction(wanted, len(examples))
        groups.append(Group(examples, weight))
    return groups


def _set_aside(
    digests: npt.NDArray[np.uint64], examples: npt.NDArray[np.intp], share: float
) -> npt.NDArray[np.bool_]:
    """Return [N], true for the chosen examples that are set aside for evaluation.

    The content decides, so that equal examples stay together, and the choice depends neither on the seed nor
    on the order of the files.
    """
    aside = np.zeros(len(digests), dtype=np.bool_)
    if share:
        count = max(round(share * len(examples)), 1)
        values, copies = np.unique(digests[examples], return_counts=True)
        # A text that occurs more often than all wanted examples together is not set aside, if there are
        # others.
        few = copies <= max(count, int(copies.min()))
        values, copies = values[few], copies[few]
        taken = max(int(np.searchsorted(np.cumsum(copies), count, side="right")), 1)
        aside[examples] = np.isin(digests[examples], values[:taken])
        if aside[examples].all():
            raise DataError(
                f"--valid-split {share} of {len(examples)} examples leaves none to train on; give a smaller "
                "share or more data"
            )
    return aside


def _check_drawn(groups: Sequence[Group]) -> None:
    drawn = sum(group.drawn(0)[1] for group in groups)
    if drawn < 1:
        raise DataError(
            "--data-weights are so small that an epoch would hold no example; give larger ones"
        )
    if drawn > _MOST_DRAWN:
        raise DataError(
            f"--data-weights and num_samples ask for {shown(drawn)} examples an epoch, more than "
            f"{_MOST_DRAWN:,}; give smaller ones"
        )
