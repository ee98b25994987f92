"""Values of supervised tokens, found by the token's identity and not by its place in a batch.

A token's identity is its sample and its position in the sample. So a table that was filled at one parallel
layout, or before a resume, serves any other.

Shape suffixes: B micro-batch, S sequence; T tokens of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_POSITION_BITS = 32


def token_keys(draw_index: Tensor, position: Tensor) -> Tensor:
    """Return one int64 for each token, ordered by sample, then by position.

    For example, sample 3 and position 7 give 3 * 2^32 + 7.

    Args:
        draw_index: int64 in [0, 2^31), of any shape.
        position: int64 in [0, 2^32), of a shape that broadcasts.
    """
    return (draw_index << _POSITION_BITS) | position


def draw_of(keys: Tensor) -> Tensor:
    """Return the sample of each key, of the same shape."""
    return keys >> _POSITION_BITS


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Statistics of T tokens.

    Attributes:
        keys: [T] int64, ascending, from `token_keys`.
        statistics: [T] each, by name.
    """

    keys: Tensor
    statistics: Mapping[str, Tensor]

    @classmethod
    def of(cls, keys: Tensor, statistics: Mapping[str, Tensor]) -> TokenTable:
        """Return a table of tokens in any order."""
        keys, order = keys.sort()
        return cls(keys, {name: values[order] for name, values in statistics.items()})

    @classmethod
    def joined(cls, tables: list[TokenTable]) -> TokenTable:
        """Return the tokens of several tables with the same statistics."""
        names = tables[0].statistics
        return cls.of(
            torch.cat([table.keys for table in tables]),
            {name: torch.cat([table.statistics[name] for table in tables]) for name in names},
        )

    def look_up(self, name: str, keys: Tensor, wanted: Tensor) -> Tensor:
        """Return the values of a statistic where `wanted` [B, S] is True, 0 elsewhere.

        Args:
            name: Name of the statistic.
            keys: [B, S] int64.
            wanted: [B, S] bool.

        Raises:
            KeyError: A wanted token is not in the table.
        """
        place = torch.searchsorted(self.keys, keys).clamp(max=max(len(self.keys) - 1, 0))
        found = self.keys[place] == keys if len(self.keys) else torch.zeros_like(wanted)
        missing = wanted & ~found
        if missing.any():
            key = int(keys[missing][0])
            raise KeyError(
                f"no {name} is known for position {key & ((1 << _POSITION_BITS) - 1)} of sample "
                f"{key >> _POSITION_BITS}, and for {int(missing.sum()) - 1} other tokens of a micro-batch"
            )
        if not len(self.keys):
            return torch.zeros_like(wanted, dtype=self.statistics[name].dtype)
        return self.statistics[name][place].masked_fill(~wanted, 0)

    def gathered(self, group: dist.ProcessGroup) -> TokenTable:
        """Return the tokens of all ranks of a group, on each of them. A collective."""
        if group.size() == 1:
            return self
        count = torch.tensor([len(self.keys)], device=self.keys.device)
        counts = [torch.empty_like(count) for _ in range(group.size())]
        dist.all_gather(counts, count, group=group)
        sizes = [int(size) for size in counts]
        return TokenTable.of(
            _gathered(self.keys, sizes, group),
            {name: _gathered(values, sizes, group) for name, values in self.statistics.items()},
        )


def _gathered(values: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Gather [T] of each rank into one vector. Collectives want equal sizes, so all are padded to the
    largest.
    """
    padded = values.new_zeros(max(sizes))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
