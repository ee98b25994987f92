"""How the work is cut: the vocabulary into blocks, whose logits exist at one time for all rows.

Cutting the vocabulary and not the rows lets the weight pass through once, and makes the gradient of
a block of the weight one product, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_profit.ops.rows import statistics_dtype

# Fewer vocabulary entries make slow products, and more blocks to add up.
_MIN_COLUMNS, _COLUMN_MULTIPLE = 1024, 256
# A block's logits, upcast. On a CPU larger blocks are no faster; on a GPU smaller ones do not keep it busy.
_BLOCK_BYTES = {"cpu": 32 << 20, "gpu": 256 << 20}
# What a pass over a block works on at one time: it stays in the cache of a CPU.
_PASS_BYTES = {"cpu": 8 << 20, "gpu": 256 << 20}

Backward = Literal["auto", "save", "recompute"]
# What the forward pass may keep of the logits, in sizes of this rank's weight.
_KEPT_WEIGHTS: dict[Backward, int] = {"auto": 1, "save": 4, "recompute": 0}
BACKWARDS = tuple(_KEPT_WEIGHTS)
# What a small weight may keep nevertheless. On a GPU computing logits again shows where products are short:
# enough for half of 8,192 tokens and Qwen3's vocabulary.
_KEPT_BYTES = {"cpu": 256 << 20, "gpu": 1280 << 20}

# Logits [m, v] and the rows [n] of them that are meant; None where they are in place.
Source = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Tiling:
    """The cut of [M rows, V vocabulary entries].

    Attributes:
        columns: vocabulary entries of a block. A block's logits are [M, columns].
        kept_rows: the logits of so many rows, the first, are kept for the backward pass.
    """

    columns: int
    kept_rows: int

    @classmethod
    def of(
        cls, weight: Tensor, num_rows: int, chunk_vocab: int | None, backward: Backward
    ) -> Tiling:
        """The cut for ``num_rows`` rows and a weight [V, H] on its device."""
        vocab, hidden = weight.shape
        fitting = _entries(_BLOCK_BYTES, weight) // max(1, num_rows)
        fitting = max(_MIN_COLUMNS, fitting - fitting % _COLUMN_MULTIPLE)
        weights = _KEPT_WEIGHTS[backward]
        kept_bytes = _KEPT_BYTES[_kind(weight)]
        kept_rows = max(weights * hidden, kept_bytes // (weight.itemsize * max(1, vocab)))
        return cls(chunk_vocab or fitting, min(kept_rows, num_rows) if weights else 0)

    def blocks(self, vocab: int) -> Iterator[slice]:
        """The blocks of the vocabulary entries 0 .. ``vocab`` - 1."""
        for start in range(0, vocab, self.columns):
            yield slice(start, min(start + self.columns, vocab))


def pass_entries(logits: Tensor) -> int:
    """Logits that a pass should work on at one time."""
    return _entries(_PASS_BYTES, logits)


def _entries(size: Mapping[str, int], tensor: Tensor) -> int:
    """How many numbers are so many bytes on the tensor's device in the precision of its statistics."""
    return size[_kind(tensor)] // statistics_dtype(tensor.dtype).itemsize


def _kind(tensor: Tensor) -> str:
    return "cpu" if tensor.device.type == "cpu" else "gpu"


class Workspace:
    """Buffers that one call uses again and again.

    Fresh memory of this size is mapped page by page on a CPU, which costs more than what is done
    with it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor, the same memory for the same name and dtype."""
        numel = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < numel:
            buffer = torch.empty(numel, dtype=dtype, device=self._device)
            self._buffers[name, dtype] = buffer
        return buffer[:numel].view(tuple(shape))
