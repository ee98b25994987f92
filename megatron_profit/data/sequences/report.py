"""The fill of the rows, and the number of records in a step."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_profit.data.sequences.order import RowOrder
from megatron_profit.data.sequences.packing import pack

# The share of filled positions below which a warning is worth it.
_FILLED = 0.5


@dataclass(frozen=True)
class PackingReport:
    """The fill of the rows in the first epoch.

    Attributes:
        examples: Examples in the epoch.
        rows: Rows of `seq_length` positions.
        seq_length: Positions of a row.
        tokens: Positions that hold an example.
        supervised: The positions among them whose label is trained.
        longest: Positions of the longest example.
        packed_rows: Rows that the examples need where several share a row.
    """

    examples: int
    rows: int
    seq_length: int
    tokens: int
    supervised: int
    longest: int
    packed_rows: int

    @classmethod
    def of(
        cls,
        order: RowOrder,
        positions: npt.NDArray[np.integer],
        labels: npt.NDArray[np.integer],
        seq_length: int,
    ) -> "PackingReport":
        """Count the first epoch; `positions` and `labels` [N] come from `Examples`."""
        drawn, rows = order.first_epoch()
        tokens, supervised = (int(counts[drawn].sum()) for counts in (positions, labels))
        longest = int(positions[drawn].max(initial=0))
        packed = len(pack(positions[drawn], seq_length)) if rows == len(drawn) else rows
        return cls(len(drawn), rows, seq_length, tokens, supervised, longest, packed)

    @property
    def efficiency(self) -> float:
        """Share of all positions that holds an example.

        For example, 0.5 if half of the positions are padding.
        """
        return self.tokens / max(self.rows * self.seq_length, 1)

    @property
    def supervised_share(self) -> float:
        """Share of the filled positions that is trained."""
        return self.supervised / max(self.tokens, 1)

    @property
    def warning(self) -> str | None:
        """A remedy where more than half of the positions are padding, None elsewhere."""
        if self.efficiency >= _FILLED:
            return None
        text = (
            f"records fill {self.efficiency:.1%} of the positions of rows, the others are padding. "
        )
        if self.packed_rows == self.rows:
            return (
                f"{text}Give a shorter --seq-length than {self.seq_length:,}; the longest record takes "
                f"{self.longest:,}"
            )
        share = self.tokens / (self.packed_rows * self.seq_length)
        return (
            f"{text}Drop --no-packing: {self.rows:,} rows become {self.packed_rows:,}, {share:.1%} filled. "
            f"A row then holds {self.examples / self.packed_rows:.1f} records; divide --global-batch-size by "
            "that to train as many in a step"
        )

    def of_step(self, rows: int) -> str:
        """Return the average content of a step of this many rows, as text."""
        records, tokens, supervised = (
            count * rows / max(self.rows, 1)
            for count in (self.examples, self.tokens, self.supervised)
        )
        return (
            f"a step of {rows:,} rows holds {records:,.1f} records on average, {tokens:,.0f} tokens, "
            f"{supervised:,.0f} of them supervised; an epoch is {self.rows / rows:,.1f} steps"
        )

    def as_json(self) -> dict[str, Any]:
        shares = {"efficiency": self.efficiency, "supervised_share": self.supervised_share}
        return {**asdict(self), **shares}

    def __str__(self) -> str:
        return (
            f"an epoch is {self.examples:,} examples in {self.rows:,} rows of {self.seq_length:,} "
            f"positions, {self.efficiency:.1%} of them filled and {self.supervised_share:.1%} of these "
            "supervised"
        )
