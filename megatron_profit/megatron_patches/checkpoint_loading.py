"""Changes to PyTorch and Megatron-Core so that loading a checkpoint runs no code from it.

The readers of `checkpoint_conversion` look at each part of a checkpoint first. torch gets only parts that
they have accepted: `.metadata` as records that are made from their values, everything else with
`weights_only`.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoint_conversion.engine.raw_files import OpenFiles
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.torch_dist.checksum_list import write_checksums
from checkpoint_conversion.torch_dist.integrity import read_vetted_common_file, vet_entry
from checkpoint_conversion.torch_dist.metadata import Metadata, Place, SavedTensor, read_metadata
from megatron_profit.megatron_patches.patch import Patch


@contextlib.contextmanager
def _safe_objects() -> Iterator[None]:
    """Let `weights_only` load the classes that `pickle_uses.OBJECTS` lists and neither torch nor Megatron
    knows.
    """
    import numpy as np
    import torch
    from megatron.core.rerun_state_machine import Call, Caller
    from numpy._core.multiarray import _reconstruct, scalar

    numeric = [type(np.dtype(code)) for code in "?bhilqBHILQefdFD"]
    older = [(_reconstruct, "numpy.core.multiarray._reconstruct")]
    scalars = [(scalar, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")]
    with torch.serialization.safe_globals(
        [*numeric, *older, *scalars, frozenset, bytes, Call, Caller]
    ):
        yield


def _load_vetted(content: io.BytesIO) -> Any:
    import torch

    with _safe_objects():
        return torch.load(content, weights_only=True)


def _make_metadata_of_plain_values() -> None:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    def read(self: Any, *_: Any, **__: Any) -> Any:
        metadata = _torch_metadata(read_metadata(Path(self.path)))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    FileSystemReader.read_metadata = read  # type: ignore[method-assign]


def _torch_metadata(found: Metadata) -> Any:
    """Return the records that torch would have unpickled, as far as a load needs them."""
    from torch.distributed.checkpoint import metadata as records
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    def stored(place: Place) -> Any:
        return _StorageInfo(place.file.name, place.start, place.length)

    entries: dict[str, Any] = {key: records.BytesStorageMetadata() for key in found.objects}
    storage = {records.MetadataIndex(key): stored(place) for key, place in found.objects.items()}
    for key, tensor in found.tensors.items():
        entries[key] = _tensor_record(tensor)
        for number, chunk in enumerate(tensor.chunks):
            index = records.MetadataIndex(key, chunk.offsets, number)
            storage[index] = stored(chunk.place)
    return records.Metadata(entries, storage_data=storage)


def _tensor_record(tensor: SavedTensor) -> Any:
    import torch
    from torch.distributed.checkpoint import metadata as records

    chunks = [
        records.ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
        for chunk in tensor.chunks
    ]
    dtype = getattr(torch, tensor.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConversionError(
            f"the checkpoint has a tensor of {tensor.dtype}, which torch does not know"
        )
    properties = records.TensorProperties(dtype=dtype)
    return records.TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)


def _vet_entries_before_they_are_read() -> None:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.planner import LoadItemType

    original = FileSystemReader.read_data

    @functools.wraps(original)
    def read_data(self: Any, plan: Any, planner: Any) -> Any:
        with OpenFiles() as files:
            for item in plan.items:
                stored = self.storage_data[item.storage_index]
                file = Path(self.path) / stored.relative_path
                place = Place(file, stored.offset, stored.length)
                is_tensor = item.type != LoadItemType.BYTE_IO
                vet_entry(files, place, item.storage_index.fqn, is_tensor=is_tensor)
        return original(self, plan, planner)

    FileSystemReader.read_data = read_data  # type: ignore[method-assign]


def _load_objects_without_running_them() -> None:
    from torch.distributed.checkpoint import DefaultLoadPlanner
    from torch.distributed.checkpoint._nested_dict import set_element

    def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        key, content = read_item.dest_index.fqn, _load_vetted(value)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[key], content)
        else:
            self.state_dict[key] = content

    DefaultLoadPlanner.load_bytes = load_bytes  # type: ignore[method-assign]


def _load_common_files_without_running_them() -> None:
    from megatron.core.dist_checkpointing import serialization

    def load_common(checkpoint_dir: str) -> Any:
        return _load_vetted(io.BytesIO(read_vetted_common_file(Path(checkpoint_dir))))

    serialization.load_common = load_common


def _list_checksums() -> None:
    from megatron.core.dist_checkpointing import serialization

    original = serialization.save_config

    @functools.wraps(original)
    def save_config(config: Any, checkpoint_dir: str) -> None:
        write_checksums(Path(checkpoint_dir))
        original(config, checkpoint_dir)

    serialization.save_config = save_config


CHECKPOINT_PATCHES = (
    Patch(
        name="checkpoint-metadata",
        functions=("torch/distributed/checkpoint/filesystem.py:FileSystemReader.read_metadata",),
        reason="FileSystemReader unpickles .metadata with Python's unpickler, which calls any function that "
        "the file names.",
        apply=_make_metadata_of_plain_values,
    ),
    Patch(
        name="checkpoint-entries",
        functions=("torch/distributed/checkpoint/filesystem.py:FileSystemReader.read_data",),
        reason="FileSystemReader does not look at an entry before it loads it: an archive that says two "
        "things, a storage that is shorter than its tensor, or what Transformer Engine unpickles by itself.",
        apply=_vet_entries_before_they_are_read,
    ),
    Patch(
        name="checkpoint-objects",
        functions=(
            "torch/distributed/checkpoint/default_planner.py:DefaultLoadPlanner.load_bytes",
        ),
        reason="DefaultLoadPlanner loads the entries that are not tensors with weights_only=False, so that "
        "they may call any function.",
        apply=_load_objects_without_running_them,
    ),
    Patch(
        name="checkpoint-common-file",
        functions=("megatron/core/dist_checkpointing/strategies/common.py:load_common",),
        reason="load_common leaves weights_only to the environment (TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD).",
        apply=_load_common_files_without_running_them,
    ),
    Patch(
        name="checkpoint-checksums",
        functions=("megatron/core/dist_checkpointing/core.py:save_config",),
        reason="A flipped bit in .metadata or in a small file of a checkpoint is not found; "
        "--verify-integrity reads the whole checkpoint again on the first rank.",
        apply=_list_checksums,
    ),
)
