"""Examples -> a data set of rows, whose order depends on (seed, index) alone.

Shape suffixes: S sequence length, L ids of one example, N examples.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_profit.data.sequences.order import Group, RowOrder
from megatron_profit.data.store.examples import Examples

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100


class SFTDataset:
    """A map-style data set for torch's `DataLoader`: rows of one example, or with packing of as many as fit.

    Each example is a segment of its row whose positions begin at 0, and so is the padding at the row's end.
    The examples of a row are a function of (seed, row) alone (order.py). So a run that resumes at row i gets
    the same row as an uninterrupted run.

    Attributes:
        labelled_rows: Rows before the ones without labels, None where there is no such limit.
        split: The use of the rows in Megatron's terms, which training sets: Megatron asks a data set for it.
    """

    split: Any = None

    def __init__(
        self,
        examples: Examples,
        seq_length: int,
        num_samples: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        packing: bool = False,
        groups: Sequence[Group] | None = None,
        epochs: int | None = None,
        period: int | None = None,
    ) -> None:
        """Set up the rows; the examples are not copied.

        Args:
            examples: Examples that `build_examples` made for the same `seq_length`.
            seq_length: Positions S of a row.
            num_samples: Rows in all, e.g. training iterations x global batch size; may be more or
                fewer than an epoch has.
            seed: Chooses the orders, in [0, 2^64).
            shuffle: False keeps the order of the files in every epoch.
            packing: Several examples to a row.
            groups: Examples to draw from and how often; None for all of them once an epoch.
            epochs: Rows after this many epochs have no label; None for epochs without end.
            period: Rows of one evaluation, None for training data. Every period starts again with the first
                row, and rows after one epoch have no label. So an evaluation counts no example twice, and
                every evaluation of a run sees the same rows.

        Raises:
            ValueError: No examples, an example that does not fit, or an argument out of range.
        """
        longest = int(np.diff(examples.offsets).max(initial=0))
        if longest > seq_length + 1:
            raise ValueError(
                f"an example has {longest} ids, a row of seq_length {seq_length} takes up to "
                f"{seq_length + 1}; build the examples with the same seq_length"
            )
        if groups is None:
            groups = [Group(np.arange(len(examples)))]
        self.order = RowOrder(
            examples.positions,
            groups,
            capacity=seq_length,
            packing=packing,
            seed=seed,
            shuffle=shuffle,
        )
        self.examples = examples
        self.seq_length = seq_length
        self.epochs = epochs
        self._resize(num_samples, period)

    def with_samples(self, num_samples: int, period: int | None = None) -> SFTDataset:
        """Return the same rows in another number; the copy shares the examples and the order."""
        other = copy.copy(self)
        other._resize(num_samples, period)
        return other

    def _resize(self, num_samples: int, period: int | None) -> None:
        if num_samples < 0:
            raise ValueError(f"num_samples must not be negative, got {num_samples}")
        if period is not None and period < 1:
            raise ValueError(f"period must be at least 1, got {period}")
        self.num_samples = num_samples
        self.period = period
        limit = 1 if period is not None else self.epochs
        self.labelled_rows = None if limit is None else self.order.rows_until(limit)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return row `index`.

        Returns:
            Five tensors [S] int64.
            tokens: Ids; 0 in padding, to which no position of an example attends.
            labels: The next token of the same example where it is supervised, else -100.
            position_ids: Position in the segment; 0 where one begins.
            example_index: The example that the token belongs to, -1 in padding.
            draw_index: Distinct for each (example, time it is drawn), whatever the packing, -1 in
                padding. Random numbers that are keyed by it and the position are new in each epoch and
                the same in any layout.

        Raises:
            IndexError: `index` is not in [0, num_samples).
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"row {index} of {self.num_samples}")
        row = _RowBuilder(self.seq_length)
        for example, sample in zip(*self._members(index), strict=True):
            ids_L, supervised_L = self.examples[example]
            row.append(ids_L, supervised_L, int(example), int(sample))
        return row.tensors()

    def _members(self, index: int) -> tuple[Sequence[int], Sequence[int]]:
        if self.period is not None:
            index %= self.period
        if self.labelled_rows is not None and index >= self.labelled_rows:
            return (), ()
        examples, samples = self.order.row(index)
        return examples.tolist(), samples.tolist()


class _RowBuilder:
    """The tensors of one row, filled example by example."""

    def __init__(self, seq_length: int) -> None:
        self._end = 0
        self._tokens_S = np.zeros(seq_length, dtype=np.int64)
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
    ) -> None:
        count = len(ids_L) - 1
        part = slice(self._end, self._end + count)
        self._tokens_S[part] = ids_L[:-1]
        self._labels_S[part] = np.where(supervised_L[1:], ids_L[1:], IGNORED_LABEL)
        self._record_S[part] = record
        self._sample_S[part] = sample
        self._segment(count)

    def tensors(self) -> dict[str, torch.Tensor]:
        import torch

        self._segment(len(self._tokens_S) - self._end)
        columns = {
            "tokens": self._tokens_S,
            "labels": self._labels_S,
            "position_ids": self._position_S,
            "example_index": self._record_S,
            "draw_index": self._sample_S,
        }
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    def _segment(self, length: int) -> None:
        self._position_S[self._end : self._end + length] = np.arange(length)
        self._end += length
