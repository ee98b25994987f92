"""The examples that share a row: best-fit decreasing, over counts of equal lengths.

The examples are taken from the longest to the shortest. Each goes into the row with the least room that still
takes it. For example, lengths 5, 4, 3, 2 in rows of 8 give the rows 5 + 3 and 4 + 2. Rows of equal room are
interchangeable and so are examples of equal length, so whole groups are placed at once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Examples, grouped into rows.

    Attributes:
        members: [M] int64; positions in the list of lengths, each once, row after row, ascending within
            a row.
        bounds: [R + 1] int64; row r holds members[bounds[r]:bounds[r + 1]].
    """

    members: npt.NDArray[np.int64]
    bounds: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1


def pack(lengths: npt.NDArray[np.integer], capacity: int) -> PackedRows:
    """Return rows of at most `capacity` that hold every example once.

    Args:
        lengths: [M], each in 1..capacity.
        capacity: Positions of a row.

    Raises:
        ValueError: A length is outside 1..capacity.
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(
            f"lengths {lengths.min()}..{lengths.max()} do not fit rows of {capacity} positions"
        )
    counts = np.bincount(lengths)
    distinct = np.flatnonzero(counts)[::-1]
    rows = _OpenRows(capacity)
    row_of = np.empty(len(lengths), dtype=np.int64)
    # Longest first; equal lengths keep their order, so that a shuffled list decides who meets whom.
    longest_first = np.argsort(-lengths.astype(np.int64), kind="stable")
    row_of[longest_first] = [
        row for length in distinct.tolist() for row in rows.place(length, int(counts[length]))
    ]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows.count))])
    return PackedRows(np.argsort(row_of, kind="stable"), bounds.astype(np.int64))


class _OpenRows:
    """The rows under construction, by the room that they have left."""

    def __init__(self, capacity: int) -> None:
        self.count = 0
        self._capacity = capacity
        self._by_room: dict[int, list[int]] = {}
        self._rooms: list[int] = []  # the keys of _by_room, ascending

    def place(self, length: int, count: int) -> list[int]:
        """Place `count` examples of one length, no longer than the ones before.

        Returns:
            The row of each.
        """
        placed: list[int] = []
        while count:
            at = bisect_left(self._rooms, length)
            if at == len(self._rooms):
                room, rows = self._capacity, self._new_rows(-(-count // (self._capacity // length)))
            else:
                room = self._rooms.pop(at)
                rows = self._by_room.pop(room)
            count -= self._fill(room, rows, length, count, placed)
        return placed

    def _fill(self, room: int, rows: list[int], length: int, count: int, placed: list[int]) -> int:
        """Fill rows of equal room one after the other; return the number of examples that were placed."""
        each = room // length
        full, rest = divmod(min(count, each * len(rows)), each)
        placed += [row for row in rows[:full] for _ in range(each)]
        self._file(room - each * length, rows[:full])
        if rest:
            placed += [rows[full]] * rest
            self._file(room - rest * length, rows[full : full + 1])
            full += 1
        self._file(room, rows[full:])
        return min(count, each * len(rows))

    def _new_rows(self, count: int) -> list[int]:
        self.count += count
        return list(range(self.count - count, self.count))

    def _file(self, room: int, rows: list[int]) -> None:
        """File rows under their room; full rows are needed no more."""
        if not rows or not room:
            return
        if room not in self._by_room:
            self._by_room[room] = []
            insort(self._rooms, room)
        self._by_room[room] += rows
