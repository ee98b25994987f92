"""Writing a torch_dist checkpoint without a model, a process group or the whole of any tensor.

The format is that of torch.distributed.checkpoint: files of entries, each written by torch.save,
and a pickled `Metadata` that says where each chunk of each tensor lies. The entries are written
here and not by torch's FileSystemWriter, which keeps the last chunk of every tensor alive until a
file is complete, copies through CUDA where there is a GPU, and puts everything into one file.

What a checkpoint must hold beside its tensors, for Megatron-Core 0.19.2 to load it under its
default strictness: an `_extra_state` entry for every module that asks for one, a `common_state`
entry with the arguments, and metadata.json (megatron/core/dist_checkpointing/serialization.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoint_conversion.chunks import Chunk
from checkpoint_conversion.families.family import Shape
from checkpoint_conversion.output import sync_file, write_file

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
_FILE_BYTES = 4 << 30
# What Megatron-Core 0.19.2 saves as the metadata of a checkpoint's content; it selects the keys of
# the sharded state dict (megatron/training/checkpointing.py, _build_sharded_state_dict_metadata).
_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
# Architecture arguments that `--use-checkpoint-args` reads and that no family changes.
_COMMON_ARGUMENTS = {
    "add_position_embedding": True,
    "use_rotary_position_embeddings": False,
    "rotary_interleaved": False,
    "squared_relu": False,
    "apply_layernorm_1p": False,
    "apply_query_key_layer_scaling": False,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "ckpt_format": "torch_dist",
}


def write_release(
    folder: Path,
    tensors: Iterable[tuple[Chunk, torch.dtype]],
    read: Callable[[Chunk, torch.dtype], torch.Tensor],
    arguments: Mapping[str, Any],
    extra_states: Mapping[str, Shape],
) -> None:
    """Write `folder`/release and the tracker file that names it.

    The metadata and the tracker come last: an interrupted write leaves nothing that Megatron loads.

    Args:
        folder: An existing, empty folder.
        tensors: All chunks of all tensors, with the dtype to write.
        read: Gives the values of a chunk in a dtype, of shape `chunk.sizes`.
        arguments: Megatron arguments of the architecture.
        extra_states: Modules with an `_extra_state` entry, and the grid of its shards.
    """
    checkpoint = folder / RELEASE
    checkpoint.mkdir()
    with _EntryFiles(checkpoint) as files:
        files.add_object("common_state/shard_0_1", _common_state(arguments))
        for module, grid in extra_states.items():
            for position in itertools.product(*map(range, grid)):
                files.add_object(_shard_name(f"{module}._extra_state", position, grid), None)
        for chunk, dtype in tensors:
            files.add_chunk(chunk, read(chunk, dtype))
    write_file(checkpoint / ".metadata", pickle.dumps(files.metadata()))
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    write_file(checkpoint / "metadata.json", json.dumps(backend).encode())
    write_file(folder / TRACKER, RELEASE.encode())


def _common_state(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron keeps once per checkpoint (megatron/training/checkpointing.py).

    The vocabulary is stored unpadded, so `padded_vocab_size` is the vocabulary; a run that needs
    padding for its tensor-parallel size gives its own.
    """
    padded = {"padded_vocab_size": arguments["vocab_size"]}
    return {
        "args": argparse.Namespace(**_COMMON_ARGUMENTS, **arguments, **padded),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": _CONTENT,
    }


def _shard_name(key: str, position: Shape, grid: Shape) -> str:
    """The name of an entry that is not a tensor (megatron/core/dist_checkpointing/mapping.py,
    ShardedObject.unique_key)."""
    return f"{key}/shard_{'.'.join(map(str, position))}_{'.'.join(map(str, grid))}"


class _EntryFiles:
    """Appends entries to numbered files and remembers where each one lies."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._count = 0
        self._stream = self._next_file()

    def add_object(self, name: str, value: Any) -> None:
        """Add a non-tensor entry; Megatron-Core stores a list with one element."""
        self._entries[name] = BytesStorageMetadata()
        self._add(MetadataIndex(name), [value])

    def add_chunk(self, chunk: Chunk, values: torch.Tensor) -> None:
        """Add a part of a tensor."""
        entry = self._entries.setdefault(
            chunk.key,
            TensorStorageMetadata(
                _PortableProperties(dtype=values.dtype),
                torch.Size(chunk.rule.megatron_shape),
                chunks=[],
            ),
        )
        assert isinstance(entry, TensorStorageMetadata)
        extent = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
        self._add(MetadataIndex(chunk.key, extent.offsets, len(entry.chunks)), values)
        entry.chunks.append(extent)

    def metadata(self) -> Metadata:
        """What `.metadata` holds."""
        return Metadata(self._entries, storage_data=self._places, version=CURRENT_DCP_VERSION)

    def __enter__(self) -> _EntryFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _add(self, index: MetadataIndex, value: Any) -> None:
        if self._stream.tell() >= _FILE_BYTES:
            self._close()
            self._stream = self._next_file()
        offset = self._stream.tell()
        torch.save(value, self._stream)
        length = self._stream.tell() - offset
        self._places[index] = _StorageInfo(Path(self._stream.name).name, offset, length)

    def _next_file(self) -> IO[bytes]:
        file = self._folder / f"__0_{self._count}.distcp"
        self._count += 1
        return file.open("xb")

    def _close(self) -> None:
        self._stream.close()
        sync_file(Path(self._stream.name))


class _PortableProperties(TensorProperties):
    """Properties that every torch reads: newer ones pickle `strides` too, which older ones refuse."""

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorProperties, (), self.__getstate__()[:5]
