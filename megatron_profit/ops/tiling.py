"""The blocks that the work is cut into: vocabulary blocks, each with the logits of all rows at one time.

Cutting the vocabulary and not the rows has two advantages. The weight is read once, and a block of the
weight's gradient is one product, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_profit.ops.rows import statistics_dtype

# With fewer vocabulary entries, products are slow and there are more blocks to add up.
_MIN_COLUMNS, _COLUMN_MULTIPLE = 1024, 256
# Bytes of a block's logits, upcast. On a CPU larger blocks are no faster; on a GPU smaller ones do not keep
# it busy.
_BLOCK_BYTES = {"cpu": 32 << 20, "gpu": 256 << 20}
# Bytes that a pass over a block works on at one time: they stay in the cache of a CPU.
_PASS_BYTES = {"cpu": 8 << 20, "gpu": 256 << 20}

Backward = Literal["auto", "save", "recompute"]
# Logits that the forward pass may keep, in sizes of this rank's weight.
_KEPT_WEIGHTS: dict[Backward, int] = {"auto": 1, "save": 4, "recompute": 0}
BACKWARDS = tuple(_KEPT_WEIGHTS)
# Bytes that may be kept even where the weight is small. On a GPU, short products make recomputing expensive.
# This is enough for half of 8,192 tokens and Qwen3's vocabulary.
_KEPT_BYTES = {"cpu": 256 << 20, "gpu": 1280 << 20}

# Logits [m, v] and the rows [n] to read; None if the logits are in place already.
GatheredLogits = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Tiling:
    """The cut of [M rows, V vocabulary entries].

    Attributes:
        columns: vocabulary entries of a block. A block's logits are [M, columns].
        kept_rows: the logits of this many rows, the first ones, are kept for the backward pass.
    """

    columns: int
    kept_rows: int

    @classmethod
    def of(
        cls, weight: Tensor, num_rows: int, chunk_vocab: int | None, backward: Backward
    ) -> Tiling:
        """Return the cut for ``num_rows`` rows and a weight [V, H] on its device."""
        vocab, hidden = weight.shape
        fitting = _entries(_BLOCK_BYTES, weight) // max(1, num_rows)
        fitting = max(_MIN_COLUMNS, fitting - fitting % _COLUMN_MULTIPLE)
        weights = _KEPT_WEIGHTS[backward]
        kept_bytes = _KEPT_BYTES[_kind(weight)]
        kept_rows = max(weights * hidden, kept_bytes // (weight.itemsize * max(1, vocab)))
        return cls(chunk_vocab or fitting, min(kept_rows, num_rows) if weights else 0)

    def blocks(self, vocab: int) -> Iterator[slice]:
        """Yield the blocks of the vocabulary entries 0 .. ``vocab`` - 1."""
        for start in range(0, vocab, self.columns):
            yield slice(start, min(start + self.columns, vocab))


def pass_entries(logits: Tensor) -> int:
    """Return logits that a pass should work on at one time."""
    return _entries(_PASS_BYTES, logits)


def _entries(size: Mapping[str, int], tensor: Tensor) -> int:
    """Return how many numbers of the tensor's statistics fit into this many bytes on its device."""
    return size[_kind(tensor)] // statistics_dtype(tensor.dtype).itemsize


def _kind(tensor: Tensor) -> str:
    return "cpu" if tensor.device.type == "cpu" else "gpu"


class Workspace:
    """Buffers that one call reuses.

    A CPU maps fresh memory of this size page by page, which takes longer than the computation in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised contiguous tensor, the same memory for the same name and dtype."""
        numel = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < numel:
            buffer = torch.empty(numel, dtype=dtype, device=self._device)
            self._buffers[name, dtype] = buffer
        return buffer[:numel].view(tuple(shape))
