"""Writer of a torch_dist checkpoint, without a model, a process group or the whole of any tensor.

The format is torch.distributed.checkpoint's. Files hold entries, each written as torch.save does. A
pickled `Metadata` holds the place of each chunk of each tensor (see `pickles.torch_pickle`).

Megatron-Core 0.19.2 loads a checkpoint under its default strictness only if it holds more than its
tensors (megatron/core/dist_checkpointing/serialization.py):

- an `_extra_state` entry for every module that asks for one,
- a `common_state` entry with the arguments, and
- metadata.json.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_conversion.engine.dtypes import DType
from checkpoint_conversion.engine.output import write_file
from checkpoint_conversion.engine.raw_files import NewFile
from checkpoint_conversion.engine.workers import Buffers, run_all
from checkpoint_conversion.families.family import Shape
from checkpoint_conversion.hf.carried import Notes, write_notes
from checkpoint_conversion.hf.chunks import TensorChunk
from checkpoint_conversion.pickles.torch_pickle import (
    Call,
    Instance,
    Named,
    dumps,
    tensor_pickle,
    write_archive,
)
from checkpoint_conversion.torch_dist.checksum_list import write_checksums

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
# Enough files for any number of workers, few enough for a parallel file system.
_FILES = 32
_LEAST_FILE_BYTES, _MOST_FILE_BYTES = 64 << 20, 4 << 30
_METADATA_VERSION = "1.0.0"  # torch.distributed.checkpoint.filesystem.CURRENT_DCP_VERSION
# Megatron-Core 0.19.2 saves this as the metadata of a checkpoint's content; it selects the keys of the
# sharded state dict (megatron/training/checkpointing.py, _build_sharded_state_dict_metadata).
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
Tensors = Sequence[tuple[TensorChunk, DType]]
Read = Callable[[TensorChunk, DType, memoryview], None]


def write_release(
    folder: Path,
    tensors: Tensors,
    read: Read,
    arguments: Mapping[str, Any],
    extra_states: Mapping[str, Shape],
    workers: int,
    notes: Notes,
) -> None:
    """Write `folder`/release and the tracker file that names it.

    The metadata and the tracker come last, so Megatron loads no checkpoint of an interrupted write. The
    files are the same for any number of workers.

    Args:
        folder: An existing, empty folder.
        tensors: All chunks of all tensors, with the dtype to write.
        read: Puts the values of a chunk in a dtype into a buffer; called by several threads.
        arguments: Megatron arguments of the architecture.
        extra_states: Modules with an `_extra_state` entry, and the grid of its shards.
        workers: Number of threads.
        notes: The notes on tensors of the HuggingFace folder that are not in the checkpoint.
    """
    checkpoint = folder / RELEASE
    checkpoint.mkdir()
    buffers = Buffers()
    objects = dict(_objects(arguments, extra_states))
    object_file = checkpoint / "__0_0.distcp"
    places = _write_objects(object_file, objects)
    groups = list(_files(tensors))

    written: list[list[_Place]] = [[] for _ in groups]

    with contextlib.ExitStack() as files:
        outputs = [
            files.enter_context(NewFile(checkpoint / f"__0_{number}.distcp"))
            for number in range(1, len(groups) + 1)
        ]

        def write(number: int) -> Iterator[None]:
            for place in _write_chunks(outputs[number], groups[number], read, buffers):
                written[number].append(place)
                yield

        run_all(write, range(len(groups)), workers)
        for output in outputs:
            output.flush()
    places += itertools.chain.from_iterable(written)
    write_file(checkpoint / ".metadata", dumps(_metadata(objects, tensors, places)))
    write_notes(checkpoint, notes)
    write_checksums(checkpoint)
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    write_file(checkpoint / "metadata.json", json.dumps(backend).encode())
    write_file(folder / TRACKER, RELEASE.encode())


def _objects(
    arguments: Mapping[str, Any], extra_states: Mapping[str, Shape]
) -> Iterator[tuple[str, Any]]:
    """Yield the entries that are not tensors.

    Their names follow megatron/core/dist_checkpointing/mapping.py, ShardedObject.unique_key.
    """
    yield "common_state/shard_0_1", _common_state(arguments)
    for module, grid in extra_states.items():
        for position in itertools.product(*map(range, grid)):
            shard = f"{'.'.join(map(str, position))}_{'.'.join(map(str, grid))}"
            yield f"{module}._extra_state/shard_{shard}", None


def _common_state(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state that Megatron keeps once per checkpoint (megatron/training/checkpointing.py).

    The vocabulary is stored unpadded, so `padded_vocab_size` is the vocabulary. A run that needs
    padding for its tensor-parallel size gives its own.
    """
    padded = {"padded_vocab_size": arguments["vocab_size"]}
    return {
        "args": argparse.Namespace(**{**_COMMON_ARGUMENTS, **arguments, **padded}),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": _CONTENT,
    }


def _files(tensors: Tensors) -> Iterator[Tensors]:
    """Yield the chunks of each file."""
    total = sum(chunk.elements * dtype.itemsize for chunk, dtype in tensors)
    limit = min(max(total // _FILES, _LEAST_FILE_BYTES), _MOST_FILE_BYTES)
    group: list[tuple[TensorChunk, DType]] = []
    size = 0
    for chunk, dtype in tensors:
        group.append((chunk, dtype))
        size += chunk.elements * dtype.itemsize
        if size >= limit:
            yield group
            group, size = [], 0
    if group:
        yield group


@dataclass(frozen=True)
class _Place:
    """The place of an entry."""

    key: str
    offsets: Shape | None
    file: str
    start: int
    length: int


def _write_objects(file: Path, objects: Mapping[str, Any]) -> list[_Place]:
    """Write entries that are not tensors; Megatron-Core stores a list with one element."""
    places = []
    with NewFile(file) as output:
        for key, value in objects.items():
            start = output.end
            write_archive(output.append, pickle.dumps([value], protocol=2))
            places.append(_Place(key, None, file.name, start, output.end - start))
        output.flush()
    return places


def _write_chunks(
    output: NewFile, tensors: Tensors, read: Read, buffers: Buffers
) -> Iterator[_Place]:
    """Write entries of tensors; the flush is left to the end of all files."""
    for chunk, dtype in tensors:
        start = output.end
        data = _data(chunk, dtype, read, buffers)
        write_archive(output.append, tensor_pickle(dtype, chunk.sizes), data)
        yield _Place(chunk.key, chunk.offsets, output.path.name, start, output.end - start)


def _data(chunk: TensorChunk, dtype: DType, read: Read, buffers: Buffers) -> Iterator[memoryview]:
    for part in chunk.parts(dtype):
        data = buffers.first(part.elements * dtype.itemsize)
        read(part, dtype, data)
        yield data


_METADATA = "torch.distributed.checkpoint.metadata"


def _metadata(objects: Iterable[str], tensors: Tensors, places: Iterable[_Place]) -> Instance:
    """Return the content of `.metadata`, in the form that every torch reads.

    Newer versions of torch write more of a tensor's properties, which older ones refuse.
    """
    entries = {key: Instance(Named(_METADATA, "BytesStorageMetadata"), {}) for key in objects}
    numbers: dict[tuple[str, Shape | None], int | None] = {}
    for key, same in itertools.groupby(tensors, key=lambda tensor: tensor[0].key):
        chunks = list(same)
        entries[key] = _tensor_metadata(chunks)
        numbers |= {(key, chunk.offsets): number for number, (chunk, _) in enumerate(chunks)}
    storage = {
        _index(place, numbers.get((place.key, place.offsets))): _storage_info(place)
        for place in places
    }
    state = {
        "state_dict_metadata": entries,
        "planner_data": None,
        "storage_data": storage,
        "storage_meta": None,
        "version": _METADATA_VERSION,
    }
    return Instance(Named(_METADATA, "Metadata"), state)


def _tensor_metadata(chunks: Tensors) -> Instance:
    chunk, dtype = chunks[0]
    contiguous = Call(Named(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    strided = Call(Named("torch.serialization", "_get_layout"), ("torch.strided",))
    properties = (Named("torch", dtype.torch), strided, False, contiguous, False)
    extents = [
        Instance(
            Named(_METADATA, "ChunkStorageMetadata"),
            {"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)},
        )
        for chunk, _ in chunks
    ]
    state = {
        "properties": Instance(Named(_METADATA, "TensorProperties"), properties),
        "size": _size(chunk.rule.megatron_shape),
        "chunks": extents,
    }
    return Instance(Named(_METADATA, "TensorStorageMetadata"), state)


def _index(place: _Place, number: int | None) -> Instance:
    offset = None if place.offsets is None else _size(place.offsets)
    state = {"fqn": place.key, "offset": offset, "index": number}
    return Instance(Named(_METADATA, "MetadataIndex"), state)


def _storage_info(place: _Place) -> Instance:
    state = {"relative_path": place.file, "offset": place.start, "length": place.length}
    return Instance(Named("torch.distributed.checkpoint.filesystem", "_StorageInfo"), state)


def _size(shape: Shape) -> Call:
    return Call(Named("torch", "Size"), (shape,))
