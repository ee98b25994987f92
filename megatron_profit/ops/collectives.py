"""A vocabulary split over a process group: which part a rank holds, and the collectives over it.

``group=None`` means one process and makes every reduction the identity, so the kernel has a single
path. Any backend that reduces the given dtype will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary rows that this rank holds: global ids [start, start + size).

    For example, 4 ranks with 40 rows each hold a vocabulary of 150: the last rank has start 120 and size 30.

    Attributes:
        start: global id of the first row.
        size: rows that are vocabulary; the rows after them are padding. May be 0 on the last ranks.
        vocab_size: vocabulary over all ranks, without padding.
        group: process group that the vocabulary is split over; None for one process.
    """

    start: int
    size: int
    vocab_size: int
    group: dist.ProcessGroup | None

    @classmethod
    def of_this_rank(
        cls, rows: int, vocab_size: int | None, group: dist.ProcessGroup | None
    ) -> VocabShard:
        """Return the shard of this rank where every rank of the group holds ``rows`` rows.

        Raises:
            ValueError: ``vocab_size`` is outside 1 .. rows * ranks.
        """
        ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
        total = rows * ranks if vocab_size is None else vocab_size
        if not 0 < total <= rows * ranks:
            raise ValueError(
                f"vocab_size {total} is outside 1..{rows * ranks} ({rows} weight rows on each of "
                f"{ranks} ranks); pass the vocabulary of all ranks, without padding."
            )
        return cls(rank * rows, min(max(total - rank * rows, 0), rows), total, group)

    def columns(self, targets: Tensor, block: slice) -> Tensor:
        """Return the columns of global ids [n] in a block of v of this rank's rows, as [n] int64.

        An id that is elsewhere gets a column outside 0 .. v - 1.
        """
        return targets - (self.start + block.start)

    @property
    def is_split(self) -> bool:
        """True if the vocabulary is on more than one rank."""
        return self.group is not None and self.group.size() > 1

    def all_sum_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its elementwise sum over the group."""
        if self.is_split:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Gather [...] of every rank into [ranks, ...]; the shapes must agree."""
        if self.group is None or not self.is_split:
            return tensor[None]
        gathered = [torch.empty_like(tensor) for _ in range(self.group.size())]
        dist.all_gather(gathered, tensor.contiguous(), group=self.group)
        return torch.stack(gathered)
