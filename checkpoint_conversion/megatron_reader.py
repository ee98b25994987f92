"""Reading the model tensors of a torch_dist checkpoint, whatever chunks a training run saved.

torch.distributed.checkpoint assembles each requested part from the saved chunks that overlap it; a
chunk that was saved is read whole, and only one at a time.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import pickle
import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from checkpoint_conversion.chunks import Chunk
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import TensorRule
from checkpoint_conversion.hf_folder import DTYPE_NAMES, read_json_object
from checkpoint_conversion.megatron_writer import RELEASE, TRACKER

# Keys of tensors beside the model: optimizer state, also of chained optimizers.
_OPTIMIZER = re.compile(r"(chained_\d+\.)*optimizer\b")

_METADATA_CLASSES = {
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath"),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
}


@dataclass(frozen=True)
class MegatronCheckpoint:
    """One torch_dist checkpoint of a model of a known family.

    Attributes:
        folder: The folder of the iteration, or `release`.
        rules: The name table, with the names that the checkpoint has.
        dtypes: The dtype of each model tensor, by key.
    """

    folder: Path
    rules: tuple[TensorRule, ...]
    dtypes: Mapping[str, torch.dtype]
    _metadata: Metadata
    _reader: _Reader

    def chunks(self, rule: TensorRule) -> Iterator[Chunk]:
        """The chunks to read a tensor in: cut where the saved chunks begin and end.

        So each saved chunk is read once, and what is held is little more than one of them.
        """
        axis, rows = len(rule.stack), rule.piece_shape[0]
        edges = {0, rows}
        for saved in _saved(self._metadata, rule.megatron).chunks:
            edges |= {saved.offsets[axis], saved.offsets[axis] + saved.sizes[axis]}
        cuts = sorted(edge for edge in edges if edge <= rows)
        for piece in rule.pieces():
            for start, stop in itertools.pairwise(cuts):
                yield Chunk(rule, piece, start, stop - start)

    def read(self, chunk: Chunk) -> torch.Tensor:
        """The values of a chunk; shape `chunk.sizes`, dtype as saved.

        Raises:
            ConversionError: When a file cannot be read.
        """
        result = torch.empty(chunk.sizes, dtype=self.dtypes[chunk.key])
        plan = dcp.LoadPlan(_read_items(self._metadata, chunk))
        try:
            self._reader.read_data(plan, _Into(result)).wait()
        except Exception as error:  # a broken file can raise almost anything
            raise ConversionError(f"{self.folder}: cannot read {chunk.key}: {error}") from error
        return result


def find_checkpoint(folder: str | Path, iteration: str | int | None = None) -> Path:
    """The folder of a checkpoint within what Megatron calls a save folder.

    Args:
        folder: A folder with latest_checkpointed_iteration.txt, or a checkpoint itself.
        iteration: A number or "release"; None for the latest.

    Raises:
        ConversionError: When there is no such checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder")
    if iteration is None and (folder / ".metadata").exists():
        return folder
    if iteration is None:
        iteration = _latest(folder)
    found = folder / _iteration_name(str(iteration))
    if not found.is_dir():
        there = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise ConversionError(f"{found}: no such checkpoint; there are: {', '.join(there) or '-'}")
    return found


def open_checkpoint(folder: Path, rules: Iterable[TensorRule]) -> MegatronCheckpoint:
    """Read the metadata of a checkpoint and check its model tensors; no tensor is read.

    Raises:
        ConversionError: When it is not a complete torch_dist checkpoint, or its model tensors are
            not those of the rules.
    """
    reader, metadata = _opened(folder)
    saved = {
        key: entry
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not _OPTIMIZER.match(key)
    }
    named = tuple(found for rule in rules for found in _as_saved(rule, saved))
    dtypes = {
        rule.megatron: _checked_dtype(folder, rule, saved.get(rule.megatron)) for rule in named
    }
    known = {key for rule in named for key in rule.keys}
    for key, entry in saved.items():
        if key in known:
            continue
        raise ConversionError(
            f"{folder}: {key} {list(entry.size)} has no place in the HuggingFace model that "
            "config.json describes"
        )
    _check_files(folder, metadata, dtypes.keys())
    return MegatronCheckpoint(folder, named, dtypes, metadata, reader)


def read_object(folder: Path, key: str) -> bytes | None:
    """The bytes of an entry that is not a tensor: what torch.save wrote; None without the entry.

    Raises:
        ConversionError: When the checkpoint is not a torch_dist checkpoint, or cannot be read.
    """
    reader, metadata = _opened(folder)
    if not isinstance(metadata.state_dict_metadata.get(key), BytesStorageMetadata):
        return None
    _check_files(folder, metadata, [key])
    planner = _Bytes(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        planner.set_up_planner({key: io.BytesIO()}, metadata, is_coordinator=True)
        reader.read_data(planner.create_local_plan(), planner).wait()
    except Exception as error:  # a broken file can raise almost anything
        raise ConversionError(f"{folder}: cannot read {key}: {error}") from error
    return planner.content


def _opened(folder: Path) -> tuple[_Reader, Metadata]:
    backend = read_json_object(folder / "metadata.json").get("sharded_backend")
    if backend != "torch_dist":
        raise ConversionError(f"{folder}: checkpoint format {backend!r}; supported is 'torch_dist'")
    reader = _Reader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    return reader, metadata


def _latest(folder: Path) -> str:
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise ConversionError(
            f"{folder}: neither {TRACKER} nor .metadata; not a Megatron save folder"
        )
    return tracker.read_text(encoding="utf-8", errors="replace").strip()


def _iteration_name(iteration: str) -> str:
    if iteration == RELEASE:
        return RELEASE
    if not re.fullmatch(r"\d+", iteration):
        raise ConversionError(f"iteration {iteration!r} is neither a number nor '{RELEASE}'")
    return f"iter_{int(iteration):07d}"


def _as_saved(rule: TensorRule, saved: Container[str]) -> list[TensorRule]:
    """A rule under the name that a checkpoint has for it; several where it has one for each layer."""
    there = [key for key in rule.keys if key in saved]
    if there:
        return [dataclasses.replace(rule, megatron=there[0], aliases=tuple(there[1:]))]
    layers = rule.per_layer()
    if layers != (rule,) and any(key in saved for layer in layers for key in layer.keys):
        return [found for layer in layers for found in _as_saved(layer, saved)]
    return [rule.renamed(rule.megatron)]


def _checked_dtype(
    folder: Path, rule: TensorRule, saved: TensorStorageMetadata | None
) -> torch.dtype:
    """The dtype of a tensor whose shape and chunks are right; a vocabulary may be padded."""
    if saved is None:
        raise ConversionError(f"{folder}: no tensor {rule.megatron}, which config.json calls for")
    shape, expected = tuple(saved.size), rule.megatron_shape
    padded = rule.vocabulary and len(shape) > 0 and shape[0] > expected[0]
    if shape != expected and not (padded and shape[1:] == expected[1:]):
        raise ConversionError(
            f"{folder}: {rule.megatron} has shape {list(shape)}; config.json calls for "
            f"{list(expected)}"
        )
    if saved.properties.dtype not in DTYPE_NAMES:
        raise ConversionError(
            f"{folder}: {rule.megatron} is {saved.properties.dtype}; supported: "
            f"{', '.join(str(dtype) for dtype in DTYPE_NAMES)}"
        )
    if sum(math.prod(chunk.sizes) for chunk in saved.chunks) != math.prod(shape):
        raise ConversionError(f"{folder}: the chunks of {rule.megatron} do not cover it")
    return saved.properties.dtype


def _check_files(folder: Path, metadata: Metadata, keys: Collection[str]) -> None:
    """Check that all that is stored of the given entries lies within a file."""
    sizes: dict[str, int] = {}
    for index, stored in metadata.storage_data.items():
        if index.fqn not in keys:
            continue
        file = folder / stored.relative_path
        if stored.relative_path not in sizes:
            if Path(stored.relative_path).name != stored.relative_path or not file.is_file():
                raise ConversionError(f"{file}: missing; {index.fqn} is in it")
            sizes[stored.relative_path] = file.stat().st_size
        if stored.offset + stored.length > sizes[stored.relative_path]:
            raise ConversionError(f"{file}: truncated; {index.fqn} does not end in it")


def _saved(metadata: Metadata, key: str) -> TensorStorageMetadata:
    entry = metadata.state_dict_metadata[key]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


def _read_items(metadata: Metadata, chunk: Chunk) -> list[ReadItem]:
    """The reads that make up a chunk.

    Raises:
        ConversionError: When the saved chunks do not cover it.
    """
    extent = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
    items = create_read_items_for_chunk_list(chunk.key, _saved(metadata, chunk.key), [extent])
    if sum(math.prod(item.lengths) for item in items) != math.prod(chunk.sizes):
        raise ConversionError(
            f"{chunk.key}: the saved chunks do not cover {list(chunk.sizes)} at {list(chunk.offsets)}"
        )
    return items


class _Into(dcp.DefaultLoadPlanner):
    """Directs everything that is read into one tensor."""

    def __init__(self, result: torch.Tensor) -> None:
        super().__init__()
        self._result = result

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = self._result
        for axis, start in enumerate(read_item.dest_offsets):
            target = target.narrow(axis, start, read_item.lengths[axis])
        return target


class _Bytes(dcp.DefaultLoadPlanner):
    """Keeps the bytes that are read as they are; the default is to unpickle them."""

    content: bytes | None = None

    def load_bytes(self, _: ReadItem, value: io.BytesIO) -> None:
        self.content = value.getvalue()


class _Reader(dcp.FileSystemReader):
    """A reader that does not run code found in `.metadata`, which is a pickle."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = _MetadataUnpickler(stream).load()
        except FileNotFoundError:
            raise ConversionError(f"{file}: missing; the checkpoint is not complete") from None
        except Exception as error:  # a broken pickle can raise almost anything
            raise ConversionError(f"{file}: not readable: {error}") from error
        parts = ("state_dict_metadata", "storage_data")
        if not all(isinstance(getattr(metadata, part, None), dict) for part in parts):
            raise ConversionError(f"{file}: no checkpoint metadata")
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of checkpoint metadata; those of Megatron are read as plain records."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module.split(".")[0] == "megatron":
            return type(name, (), {})
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is no metadata")
