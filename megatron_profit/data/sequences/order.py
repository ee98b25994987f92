"""The order of the examples: the content of a row is a function of the seed and the row's number alone.

Epochs follow one another without a seam. In each, the examples are drawn (file by file, as often as the
file's weight says), shuffled, put into rows, and the rows shuffled.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megatron_profit.data.sequences.packing import PackedRows, pack

# Independent streams of random numbers of one (seed, epoch).
_SHUFFLE_EXAMPLES, _SHUFFLE_ROWS, _DRAW = 0, 1, 2


@dataclass(frozen=True)
class Group:
    """Examples that are drawn equally often.

    Attributes:
        examples: [n] int64, their indices.
        weight: Average number of times that an epoch holds each of them.
    """

    examples: npt.NDArray[np.int64]
    weight: float | Fraction = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"the weight of a file must be positive and finite, got {self.weight}")

    def drawn(self, epoch: int) -> tuple[int, int]:
        """Return the range of an epoch in the endless sequence of this group's cycles.

        A cycle holds every example once, so none is drawn a second time before all were drawn. For example,
        10 examples of weight 1.5 give 0 to 15 in epoch 0 and 15 to 30 in epoch 1.
        """
        per_epoch = Fraction(str(self.weight)) * len(self.examples)
        return int(epoch * per_epoch), int((epoch + 1) * per_epoch)


@dataclass(frozen=True)
class _Epoch:
    """The draws of an epoch, in rows: `rows` indexes `examples` and `cycles`, both [M] int64."""

    examples: npt.NDArray[np.int64]
    cycles: npt.NDArray[np.int64]
    rows: PackedRows


class RowOrder:
    """The examples of every row of a data set without end."""

    def __init__(
        self,
        lengths: npt.NDArray[np.integer],
        groups: Sequence[Group],
        *,
        capacity: int,
        packing: bool,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        """Set up the order; an epoch is laid out when one of its rows is asked for.

        Args:
            lengths: [N] positions that each example takes in a row.
            groups: Groups to draw from; indices are into `lengths`.
            capacity: Positions of a row.
            packing: Several examples to a row, as many as fit; else one.
            seed: Chooses the orders, in [0, 2^64).
            shuffle: False keeps the examples, and the rows, in the order of the files.

        Raises:
            ValueError: No examples, one that does not fit, or an argument out of range.
        """
        if not any(len(group.examples) for group in groups):
            raise ValueError("there is no example to draw from")
        if sum(group.drawn(0)[1] for group in groups) < 1:
            raise ValueError("the weights of the files are so small that an epoch has no example")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2^64), got {seed}")
        if lengths.max() > capacity:
            raise ValueError(f"an example takes {lengths.max()} positions, a row has {capacity}")
        self._lengths, self._groups, self._capacity = lengths, groups, capacity
        self._packing, self._seed, self._shuffle = packing, seed, shuffle
        self._epochs: dict[int, _Epoch] = {}
        self._starts = [0]

    def rows_until(self, epoch: int) -> int:
        """Return the rows of all epochs before `epoch`."""
        while len(self._starts) <= epoch:
            latest = self._epoch(len(self._starts) - 1)
            self._starts.append(self._starts[-1] + len(latest.rows))
        return self._starts[epoch]

    def first_epoch(self) -> tuple[npt.NDArray[np.int64], int]:
        """Return the examples of the first epoch, in no order of meaning, and its number of rows."""
        return self._epoch(0).examples, self.rows_until(1)

    def row(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the examples of a row, and for each a number that is distinct for each time it is drawn.

        Neither the number nor the draws of an epoch depend on the packing.
        """
        while self._starts[-1] <= index:
            self.rows_until(len(self._starts))
        epoch = bisect_right(self._starts, index) - 1
        laid_out = self._epoch(epoch)
        rows, place = laid_out.rows, index - self._starts[epoch]
        members = rows.members[rows.bounds[place] : rows.bounds[place + 1]]
        examples = laid_out.examples[members]
        return examples, laid_out.cycles[members] * len(self._lengths) + examples

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            # Two are kept, for readers that work on both sides of an epoch's end.
            self._epochs = dict(list(self._epochs.items())[-1:])
            self._epochs[epoch] = self._lay_out(epoch)
        return self._epochs[epoch]

    def _lay_out(self, epoch: int) -> _Epoch:
        examples, cycles = self._drawn(epoch)
        if self._shuffle:
            order = _permutation(self._seed, epoch, _SHUFFLE_EXAMPLES, len(examples))
            examples, cycles = examples[order], cycles[order]
        if not self._packing:
            each = np.arange(len(examples) + 1, dtype=np.int64)
            return _Epoch(examples, cycles, PackedRows(each[:-1], each))
        rows = pack(self._lengths[examples], self._capacity)
        if self._shuffle:
            rows = _reordered(rows, _permutation(self._seed, epoch, _SHUFFLE_ROWS, len(rows)))
        return _Epoch(examples, cycles, rows)

    def _drawn(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return [M] examples of an epoch and the cycle of its group that each is drawn in."""
        examples, cycles = [], []
        for number, group in enumerate(self._groups):
            begin, end = group.drawn(epoch)
            size = max(len(group.examples), 1)
            for cycle in range(begin // size, -(-end // size)):
                part = slice(max(begin - cycle * size, 0), min(end - cycle * size, size))
                drawn = self._cycle(number, cycle, whole=part == slice(0, size))[part]
                examples.append(drawn)
                cycles.append(np.full(len(drawn), cycle, dtype=np.int64))
        return np.concatenate(examples), np.concatenate(cycles)

    def _cycle(self, number: int, cycle: int, whole: bool) -> npt.NDArray[np.int64]:
        """Return a group's examples in the order of a cycle, which matters only where a part is drawn."""
        examples = self._groups[number].examples
        if whole or not self._shuffle:
            return examples
        return examples[_permutation(self._seed, cycle, _DRAW + number, len(examples))]


def _permutation(seed: int, epoch: int, stream: int, size: int) -> npt.NDArray[np.int64]:
    # Sorted raw bits: numpy promises these for all versions, but not permutation().
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=counter).random_raw(size)
    return np.argsort(bits, kind="stable")


def _reordered(rows: PackedRows, order: npt.NDArray[np.int64]) -> PackedRows:
    sizes = np.diff(rows.bounds)[order]
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    # Member k of the new rows is the member at the same place in its old row.
    shift = np.repeat(rows.bounds[:-1][order] - bounds[:-1], sizes)
    return PackedRows(rows.members[np.arange(bounds[-1]) + shift], bounds)
