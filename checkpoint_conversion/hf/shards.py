"""One rank's block of a Megatron tensor, read from or written to a HuggingFace folder.

It uses the name tables and layouts of a conversion, without a checkpoint in between. A block spans rows
and, in a layer that is split by columns, only some of the columns. Then whole rows are read through a
buffer: parts of a few kB would each cost a round trip to a network file system.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from checkpoint_conversion.engine.raw_files import OpenFiles, write_at, writing
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families.family import Shape, StackedSlice, TensorRule
from checkpoint_conversion.hf.chunks import CHUNK_BYTES, TensorChunk
from checkpoint_conversion.hf.folder import HFTensor
from checkpoint_conversion.hf.model import HFModel
from checkpoint_conversion.hf.torch_tensors import TORCH, cast, read_chunk, tensor_bytes


@dataclass(frozen=True)
class Shard:
    """A block of a Megatron tensor, as `megatron.core.dist_checkpointing.ShardedTensor` names it.

    Attributes:
        key: Key in a torch_dist checkpoint.
        shape: Shape of the whole tensor, stacked axes first.
        offsets: Position of the block in it.
        values: The block, without the stacked axes.
    """

    key: str
    shape: Shape
    offsets: Shape
    values: torch.Tensor


class Rules:
    """The name table of a model, by Megatron key."""

    def __init__(self, rules: Iterable[TensorRule]) -> None:
        self._entries = {key: _Entry(rule) for rule in rules for key in rule.keys}

    def blocks(self, shard: Shard) -> Iterator[Block]:
        """Yield the runs of rows that make up a shard, without the rows that pad the vocabulary.

        Each holds at most CHUNK_BYTES in the width of the whole tensor, but at least a row.

        Raises:
            ConversionError: For a key that the family does not have, or another shape.
        """
        entry = self._entries.get(shard.key)
        if entry is None:
            raise ConversionError(
                f"the model has a tensor {shard.key} {list(shard.shape)}, which no HuggingFace tensor "
                "of this architecture gives"
            )
        rule = entry.rule
        _check_shape(rule, shard)
        stacked = len(rule.stack)
        first, *columns = shard.offsets[stacked:]
        rows = min(len(shard.values), max(0, rule.piece_shape[0] - first))
        width = math.prod(rule.piece_shape[1:]) * 4
        step = max(1, CHUNK_BYTES // width)
        window = tuple(
            slice(start, start + size)
            for start, size in zip(columns, shard.values.shape[1:], strict=True)
        )
        piece = entry.pieces[shard.offsets[:stacked]]
        for start in range(0, rows, step):
            count = min(step, rows - start)
            yield Block(
                TensorChunk(rule, piece, first + start, count),
                window,
                shard.values[start : start + count],
            )


@dataclass(frozen=True)
class _Entry:
    rule: TensorRule

    @cached_property
    def pieces(self) -> dict[tuple[int, ...], StackedSlice]:
        return {piece.index: piece for piece in self.rule.pieces()}


@dataclass(frozen=True)
class Block:
    """Some rows of a shard.

    Attributes:
        chunk: The same rows of the whole tensor.
        window: The shard's part of the other axes.
        values: The shard's values of these rows.
    """

    chunk: TensorChunk
    window: tuple[slice, ...]
    values: torch.Tensor


def read_shard(model: HFModel, rules: Rules, shard: Shard) -> None:
    """Fill a shard from a HuggingFace folder; rows that pad the vocabulary become 0.

    Args:
        model: The folder.
        rules: Its name table.
        shard: The shard to fill, in place; values are cast to its dtype, and may be on any device.

    Raises:
        ConversionError: For a tensor that the folder does not give, another shape, a value outside the
            range of the dtype, or a truncated file.
    """
    done = 0
    with OpenFiles() as files:
        for block in rules.blocks(shard):
            chunk = block.chunk
            values = read_chunk(model, chunk, shard.values.dtype, files)
            values = values.view(chunk.rows, *chunk.rule.piece_shape[1:])
            block.values.copy_(values[(slice(None), *block.window)])
            done += chunk.rows
    shard.values[done:].zero_()


def write_shard(tensors: Mapping[str, HFTensor], rules: Rules, shard: Shard) -> int:
    """Write a shard to its place in the safetensors files of a folder that has all headers.

    Several processes may write different shards of one tensor at the same time.

    Args:
        tensors: The tensors of the folder by name (see `hf.folder.list_tensors`).
        rules: Its name table.
        shard: The shard to write; values are cast to the dtypes of `tensors`.

    Returns:
        The number of elements written; rows that pad the vocabulary are left out.

    Raises:
        ConversionError: As `read_shard`, or the file cannot be written; for example, the disk is full.
    """
    elements = 0
    for block in rules.blocks(shard):
        chunk, values = block.chunk, block.values.cpu()
        elements += values.numel()
        for source, start, rows in chunk.layout:
            tensor = tensors[chunk.piece.hf[source]]
            part = cast(values[:rows], TORCH[tensor.dtype], tensor.name)
            _write_rows(tensor, start, block.window, part.contiguous())
            values = values[rows:]
    return elements


def _write_rows(
    tensor: HFTensor, start: int, window: tuple[slice, ...], values: torch.Tensor
) -> None:
    """Write some columns of the rows of a tensor from `start` on; whole rows in one write."""
    item = values.dtype.itemsize
    whole = values.shape[1:] == tensor.shape[1:]
    assert whole or values.ndim == 2, "only matrices are split by columns"
    skip = 0 if whole else window[0].start * item
    data = tensor_bytes(values)
    length = len(data) if whole else values.shape[1] * item
    # The file is not opened for reading too: a network file system could then write back whole pages of
    # it, over rows that other nodes have written.
    with writing(tensor.file):
        descriptor = os.open(tensor.file, os.O_WRONLY)
        try:
            for row, begin in enumerate(range(0, len(data), length)):
                offset = tensor.offset + (start + row) * tensor.row_bytes + skip
                write_at(descriptor, offset, data[begin : begin + length])
        finally:
            os.close(descriptor)


def _check_shape(rule: TensorRule, shard: Shard) -> None:
    expected = rule.megatron_shape
    padded = rule.vocabulary and shard.shape[0] >= expected[0] and shard.shape[1:] == expected[1:]
    if shard.shape != expected and not padded:
        raise ConversionError(
            f"the model's {shard.key} has shape {list(shard.shape)}; config.json calls for "
            f"{list(expected)}"
        )
