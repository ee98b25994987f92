"""The rows that are worked on, and their logits, one chunk at a time.

Everything between the entry and the exit of the kernel has one entry per supervised row; prompts
and padding take part in nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Memory of one chunk's logits, upcast: enough rows to fill a GPU, little beside a model.
CHUNK_BYTES = 1 << 28


@dataclass(frozen=True, eq=False)
class SupervisedRows:
    """M supervised rows among N.

    Attributes:
        index: [M] int64, ascending positions among the N rows.
        targets: [M] int64 global vocabulary ids.
        num_rows: N.
        chunk_rows: rows whose logits exist at one time.
    """

    index: Tensor
    targets: Tensor
    num_rows: int
    chunk_rows: int

    @classmethod
    def of(cls, supervised: Tensor, labels: Tensor, chunk_rows: int) -> SupervisedRows:
        """The rows where ``supervised`` [N] bool is True, with their ``labels`` [N]."""
        index = supervised.nonzero().squeeze(1)
        return cls(index, labels[index], labels.numel(), chunk_rows)

    def __len__(self) -> int:
        return self.index.numel()

    def chunks(self) -> Iterator[slice]:
        """Slices of the M rows."""
        for start in range(0, len(self), self.chunk_rows):
            yield slice(start, start + self.chunk_rows)

    def take(self, vector: Tensor) -> Tensor:
        """[N] to [M]."""
        return vector[self.index]

    def scatter(self, tensor: Tensor) -> Tensor:
        """[M, ...] to [N, ...] with zeros in the other rows."""
        return tensor.new_zeros(self.num_rows, *tensor.shape[1:]).index_copy_(0, self.index, tensor)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.promote_types(dtype, torch.float32)


def default_chunk_rows(weight: Tensor) -> int:
    """Rows whose logits on ``weight`` [V, H] fill ``CHUNK_BYTES``.

    V counts padding too, so that the ranks of a group agree whatever part of it is vocabulary.
    """
    return max(1, CHUNK_BYTES // (statistics_dtype(weight.dtype).itemsize * weight.size(0)))


def chunk_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits [n, V] of a chunk, rounded to the input dtype, then upcast; free to overwrite."""
    return (hidden @ weight.t()).to(statistics_dtype(hidden.dtype))


def input_precision(tensor: Tensor) -> torch.autocast:
    """A context in which products keep the dtype of their inputs, whatever autocast is active.

    The backward pass recomputes the logits of the forward pass: both must be rounded alike.
    """
    return torch.autocast(tensor.device.type, enabled=False)
