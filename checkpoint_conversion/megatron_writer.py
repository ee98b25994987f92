"""Writing a torch_dist checkpoint without a model, a process group or the whole of any tensor.

torch.distributed.checkpoint plans and writes the checkpoint. The planner here describes chunks and
produces each one only when the writer asks for it. The writer exists because torch's own
FileSystemWriter keeps the last chunk of every tensor alive until a file is complete, copies through
CUDA where there is a GPU, and puts everything into one file.

What a checkpoint must hold beside its tensors, for Megatron-Core 0.19.2 to load it under its
default
strictness: an `_extra_state` entry for every module that asks for one, a `common_state` entry with
the arguments, and metadata.json (megatron/core/dist_checkpointing/serialization.py).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from checkpoint_conversion.chunks import Chunk
from checkpoint_conversion.output import write_file

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
    tensors: Sequence[tuple[Chunk, torch.dtype]],
    read: Callable[[Chunk, torch.dtype], torch.Tensor],
    arguments: Mapping[str, Any],
    extra_states: Mapping[str, int],
) -> None:
    """Write `folder`/release and the tracker file that names it.

    The tracker comes last: an interrupted write leaves nothing that Megatron would load.

    Args:
        folder: An existing, empty folder.
        tensors: All chunks of all tensors, with the dtype to write.
        read: Gives the values of a chunk in a dtype, of shape `chunk.sizes`.
        arguments: Megatron arguments of the architecture.
        extra_states: Modules with an `_extra_state` entry, and the number of its shards.
    """
    checkpoint = folder / RELEASE
    objects = {"common_state/shard_0_1": _serialized(_common_state(arguments))}
    for module, shards in extra_states.items():
        for shard in range(shards):
            objects[f"{module}._extra_state/shard_{shard}_{shards}"] = _serialized(None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(
            {},
            storage_writer=_ChunkWriter(checkpoint, single_file_per_rank=True),
            planner=_ChunkPlanner(tensors, read, objects),
            no_dist=True,
        )
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


def _serialized(value: Any) -> bytes:
    """A non-tensor entry as Megatron-Core stores it: torch.save of a list of one element."""
    stream = io.BytesIO()
    torch.save([value], stream)
    return stream.getvalue()


class _ChunkPlanner(dcp.SavePlanner):
    """A plan made of chunks; values are read when the writer comes to them."""

    def __init__(
        self,
        tensors: Iterable[tuple[Chunk, torch.dtype]],
        read: Callable[[Chunk, torch.dtype], torch.Tensor],
        objects: Mapping[str, bytes],
    ) -> None:
        self._read = read
        self._objects = objects
        self._chunks: dict[MetadataIndex, tuple[Chunk, torch.dtype]] = {}
        self._items: list[WriteItem] = []
        self._metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name in objects:
            self._items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
            self._metadata[name] = BytesStorageMetadata()
        for chunk, dtype in tensors:
            self._add(chunk, dtype)

    def _add(self, chunk: Chunk, dtype: torch.dtype) -> None:
        properties = _PortableProperties(dtype=dtype)
        size = torch.Size(chunk.rule.megatron_shape)
        entry = self._metadata.setdefault(
            chunk.key, TensorStorageMetadata(properties, size, chunks=[])
        )
        assert isinstance(entry, TensorStorageMetadata)
        extent = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
        index = MetadataIndex(chunk.key, extent.offsets, len(entry.chunks))
        entry.chunks.append(extent)
        self._chunks[index] = (chunk, dtype)
        data = TensorWriteData(extent, properties, size)
        self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Nothing: the plan does not depend on a state dict."""

    def create_local_plan(self) -> dcp.SavePlan:
        return dcp.SavePlan(self._items)

    def create_global_plan(
        self, all_plans: list[dcp.SavePlan]
    ) -> tuple[list[dcp.SavePlan], Metadata]:
        return all_plans, Metadata(self._metadata)

    def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        return self._read(*self._chunks[write_item.index])


class _PortableProperties(TensorProperties):
    """Properties that every torch reads: newer ones pickle `strides` too, which older ones refuse."""

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorProperties, (), self.__getstate__()[:5]


class _ChunkWriter(dcp.FileSystemWriter):
    """Writes one item at a time and starts a new file when one is large."""

    def storage_meta(self) -> StorageMeta | None:
        """None: a path and a random id would make equal checkpoints different."""
        return None

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        prefix: _StoragePrefix = plan.storage_data
        items, results, files = list(plan.items), [], 0
        while items:
            name = f"{prefix.prefix}{files}.distcp"
            files += 1
            with (Path(self.path) / name).open("wb") as stream:
                while items and stream.tell() < _FILE_BYTES:
                    results.append(_write_item(stream, name, items.pop(0), planner))
                stream.flush()
                os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _write_item(stream: Any, name: str, item: WriteItem, planner: dcp.SavePlanner) -> WriteResult:
    offset = stream.tell()
    data = planner.resolve_data(item)
    if isinstance(data, io.BytesIO):
        stream.write(data.getbuffer())
    else:
        torch.save(data, stream)
    length = stream.tell() - offset
    return WriteResult(item.index, length, _StorageInfo(name, offset, length))
