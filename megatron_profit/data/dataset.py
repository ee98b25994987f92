"""Files of chat records -> examples in memory -> a data set whose order depends on (seed, index).

`build_examples` is the slow part and runs once; it keeps the examples in three flat arrays, which
cost 5 bytes a token and are shared by forked workers without a copy. `SFTDataset` only cuts rows
out of them.

Shape suffixes: S sequence length, L ids of one example, N examples.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from megatron_profit.data.chat import UnknownFormat, normalise
from megatron_profit.data.errors import BrokenRecord, DataError, shown
from megatron_profit.data.order import Group, RowOrder
from megatron_profit.data.records import RawRecord, read_records
from megatron_profit.data.render import ChatRenderer, RenderedConversation

IGNORED_LABEL = -100
UNKNOWN_FORMAT = "the format is not known, unlike the file's first record"
NOTHING_SUPERVISED = "no supervised token is left within the sequence length"

PROGRESS_SECONDS = 2.0
_PLACES_KEPT = 5


@dataclass(frozen=True, slots=True)
class Examples:
    """Tokenised records, end to end.

    Attributes:
        ids: [total] int32 token ids of all examples.
        supervised: [total] uint8, 1 where the model must produce this token.
        offsets: [N + 1] int64; example i is the range offsets[i]:offsets[i + 1].
    """

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Ids [L] and supervised [L] of one example, views without a copy."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[part], self.supervised[part]


@dataclass(slots=True)
class Skipped:
    """Records left out for one reason: how many, where, and what was found in the first."""

    detail: str
    count: int = 0
    places: list[str] = field(default_factory=list)


@dataclass(slots=True)
class PreparationReport:
    """What became of the records.

    Attributes:
        read: Records in the files.
        kept: Examples made of them.
        skipped: Reason -> the records left out for it; read = kept + the sum of their counts.
        truncated: Kept examples of which the end was cut off.
        supervised_tokens: Labels that are trained in one epoch.
        total_tokens: Ids of the kept examples, after truncation.
        longest: Ids of the longest usable record, before truncation.
    """

    read: int = 0
    kept: int = 0
    skipped: dict[str, Skipped] = field(default_factory=dict)
    truncated: int = 0
    supervised_tokens: int = 0
    total_tokens: int = 0
    longest: int = 0

    def skip(self, record: RawRecord, reason: str, detail: str) -> None:
        """Counts a record that is left out."""
        skipped = self.skipped.setdefault(reason, Skipped(detail))
        skipped.count += 1
        if len(skipped.places) < _PLACES_KEPT:
            skipped.places.append(record.where)

    def __str__(self) -> str:
        share = self.supervised_tokens / max(self.total_tokens, 1)
        lines = [
            f"{self.read:,} records read, {self.kept:,} kept, {self.read - self.kept:,} skipped, "
            f"{self.truncated:,} truncated",
            f"{self.total_tokens:,} tokens, {self.supervised_tokens:,} of them supervised "
            f"({share:.1%}); the longest record has {self.longest:,}",
        ]
        for reason, skipped in self.skipped.items():
            more = ", ..." if skipped.count > len(skipped.places) else ""
            lines.append(f"skipped {skipped.count:,}: {reason} ({'; '.join(skipped.places)}{more})")
            lines.append(f"  the first: {skipped.detail}")
        return "\n".join(lines)


def build_examples(
    files: str | Path | Sequence[str | Path],
    renderer: ChatRenderer,
    seq_length: int,
    *,
    progress: Callable[[str], None] | None = None,
) -> tuple[Examples, PreparationReport]:
    """Reads, normalises, renders and tokenises every record of the files.

    An example of L ids gives L - 1 pairs of token and label, so up to `seq_length` + 1 ids are
    kept; longer ones lose their end. A broken record is left out and counted in the report.

    Args:
        files: Paths as in `read_records`.
        renderer: Renders and masks a conversation.
        seq_length: Positions of a training row, at least 1.
        progress: Called with a line of text about every two seconds.

    Raises:
        ValueError: `seq_length` < 1.
        DataError: A file cannot be read, its first record is in no known format, or no record is
            usable.
    """
    if seq_length < 1:
        raise ValueError(f"seq_length must be at least 1, got {seq_length}")
    report, kept = PreparationReport(), []
    recognised: set[str] = set()
    tell = _Ticker(progress, report)
    for record in read_records(files):
        report.read += 1
        try:
            kept.append(_example(record, renderer, seq_length, report))
        except UnknownFormat:
            if record.file not in recognised:
                raise
            report.skip(record, UNKNOWN_FORMAT, f"found the keys {shown(list(record.value))}")
        except BrokenRecord as error:
            report.skip(record, error.reason, error.detail)
        recognised.add(record.file)
        tell()
    if not kept:
        raise DataError(f"no record can be used for training:\n{report}")
    return _joined(kept), report


def _example(
    record: RawRecord, renderer: ChatRenderer, seq_length: int, report: PreparationReport
) -> RenderedConversation:
    """The example that a record gives, counted in the report.

    Raises:
        UnknownFormat, BrokenRecord: The record gives none; nothing but its length was counted.
    """
    whole = renderer.render(normalise(record))
    length = len(whole.ids)
    report.longest = max(report.longest, length)
    example = RenderedConversation(whole.ids[: seq_length + 1], whole.supervised[: seq_length + 1])
    labels = int(example.supervised[1:].sum())
    if labels == 0:
        raise BrokenRecord(
            NOTHING_SUPERVISED,
            f"the record has {length} tokens, the sequence length is {seq_length}",
        )
    report.kept += 1
    report.truncated += len(example.ids) < length
    report.total_tokens += len(example.ids)
    report.supervised_tokens += labels
    return example


def _joined(examples: list[RenderedConversation]) -> Examples:
    lengths = [len(example.ids) for example in examples]
    return Examples(
        ids=np.concatenate([example.ids for example in examples]),
        supervised=np.concatenate([example.supervised for example in examples]).astype(np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


class _Ticker:
    """Tells at most every PROGRESS_SECONDS how far the preparation is."""

    def __init__(self, progress: Callable[[str], None] | None, report: PreparationReport) -> None:
        self._progress, self._report = progress, report
        self._start = self._told = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if self._progress is None or now - self._told < PROGRESS_SECONDS:
            return
        self._told = now
        report, rate = self._report, self._report.read / max(now - self._start, 1e-9)
        self._progress(
            f"preparing data: {report.read:,} records read, {report.kept:,} kept, "
            f"{report.total_tokens:,} tokens, {rate:,.0f} records/s"
        )


class SFTDataset(Dataset[dict[str, torch.Tensor]]):
    """Rows of one example, or with packing of as many as fit.

    Each example is a segment of its row whose positions begin at 0, and so is the padding at the row's
    end. Which examples a row holds is a function of (seed, row) alone (order.py): a run that resumes at
    row i sees what an uninterrupted run would have seen.
    """

    def __init__(
        self,
        examples: Examples,
        seq_length: int,
        num_samples: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        packing: bool = False,
        pad_id: int = 0,
        pad_multiple: int = 1,
        groups: Sequence[Group] | None = None,
        epochs: int | None = None,
        period: int | None = None,
    ) -> None:
        """Sets up the rows; copies nothing.

        Args:
            examples: What `build_examples` gave for the same `seq_length`.
            seq_length: Positions S of a row.
            num_samples: Rows in all, e.g. training iterations x global batch size; may be more or
                fewer than an epoch has.
            seed: Chooses the orders, in [0, 2^64).
            shuffle: False keeps the order of the files in every epoch (for evaluation).
            packing: Several examples to a row.
            pad_id: Token where there is none of an example. No label is there, and no position of an
                example attends to it.
            pad_multiple: Each example of a row is padded to a multiple of it, e.g. twice the
                context-parallel size. That padding belongs to the example's segment.
            groups: Examples to draw from and how often; None for all of them once an epoch.
            epochs: Rows behind this many epochs have no label; None for epochs without end.
            period: Rows of one evaluation, None for training data. Every period begins anew with the
                first row, and rows behind one epoch have no label, so that an evaluation counts no
                example twice and every evaluation of a run sees the same.

        Raises:
            ValueError: No examples, an example that does not fit, or an argument out of range.
        """
        if num_samples < 0:
            raise ValueError(f"num_samples must not be negative, got {num_samples}")
        if period is not None and period < 1:
            raise ValueError(f"period must be at least 1, got {period}")
        if pad_multiple < 1 or seq_length % pad_multiple:
            raise ValueError(f"pad_multiple {pad_multiple} does not divide seq_length {seq_length}")
        longest = int(np.diff(examples.offsets).max(initial=0))
        if longest > seq_length + 1:
            raise ValueError(
                f"an example has {longest} ids, a row of seq_length {seq_length} takes up to "
                f"{seq_length + 1}; build the examples with the same seq_length"
            )
        if groups is None:
            groups = [Group(np.arange(len(examples)))]
        lengths = -(-(np.diff(examples.offsets) - 1) // pad_multiple) * pad_multiple
        self.order = RowOrder(
            lengths, groups, capacity=seq_length, packing=packing, seed=seed, shuffle=shuffle
        )
        self.examples = examples
        self.seq_length = seq_length
        self.num_samples = num_samples
        self.pad_id = pad_id
        self.pad_multiple = pad_multiple
        self.period = period
        limit = 1 if period is not None else epochs
        self._labelled_rows = None if limit is None else self.order.rows_until(limit)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Row `index`.

        Returns:
            Five tensors [S] int64.
            tokens: Ids; `pad_id` in padding.
            labels: The next token of the same example where it is supervised, else -100.
            position_ids: Position in the segment; 0 where one begins.
            record_index: The example that the token belongs to, -1 in padding.
            sample_index: Distinct for each (example, time it is drawn), whatever the packing, -1 in
                padding. Random numbers that are keyed by it and the position are new in each epoch and
                the same in any layout.

        Raises:
            IndexError: `index` is not in [0, num_samples).
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"row {index} of {self.num_samples}")
        row = _Row(self.seq_length, self.pad_id)
        for example, sample in zip(*self._members(index), strict=True):
            ids_L, supervised_L = self.examples[example]
            row.append(ids_L, supervised_L, int(example), int(sample), self.pad_multiple)
        return row.tensors()

    def _members(self, index: int) -> tuple[Sequence[int], Sequence[int]]:
        if self.period is not None:
            index %= self.period
        if self._labelled_rows is not None and index >= self._labelled_rows:
            return (), ()
        examples, samples = self.order.row(index)
        return examples.tolist(), samples.tolist()


class _Row:
    """The tensors of one row, filled example by example."""

    def __init__(self, seq_length: int, pad_id: int) -> None:
        self._end = 0
        self._tokens_S = np.full(seq_length, pad_id, dtype=np.int64)
        self._labels_S = np.full(seq_length, IGNORED_LABEL, dtype=np.int64)
        self._position_S = np.empty(seq_length, dtype=np.int64)
        self._record_S = np.full(seq_length, -1, dtype=np.int64)
        self._sample_S = np.full(seq_length, -1, dtype=np.int64)

    def append(
        self,
        ids_L: npt.NDArray[np.int32],
        supervised_L: npt.NDArray[np.uint8],
        record: int,
        sample: int,
        pad_multiple: int,
    ) -> None:
        count = len(ids_L) - 1
        part = slice(self._end, self._end + count)
        self._tokens_S[part] = ids_L[:-1]
        self._labels_S[part] = np.where(supervised_L[1:], ids_L[1:], IGNORED_LABEL)
        self._record_S[part] = record
        self._sample_S[part] = sample
        self._segment(-(-count // pad_multiple) * pad_multiple)

    def tensors(self) -> dict[str, torch.Tensor]:
        self._segment(len(self._tokens_S) - self._end)
        columns = {
            "tokens": self._tokens_S,
            "labels": self._labels_S,
            "position_ids": self._position_S,
            "record_index": self._record_S,
            "sample_index": self._sample_S,
        }
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    def _segment(self, length: int) -> None:
        self._position_S[self._end : self._end + length] = np.arange(length)
        self._end += length
