"""The `.metadata` of a checkpoint: its tensors and objects, and the place of each part in the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint_conversion.engine.regular_files import read_regular
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families.family import Shape
from checkpoint_conversion.hf.folder import read_json_object
from checkpoint_conversion.pickles.reader import read_pickle
from checkpoint_conversion.pickles.uses import METADATA, is_size, is_sizes, within
from checkpoint_conversion.pickles.values import Instance, PickleError
from checkpoint_conversion.torch_dist.checksum_list import check_checksum, checksum_of

METADATA_FILE = ".metadata"
# metadata.json may hold only these values; the last two until Megatron-Core 0.18.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# About 150 bytes for each chunk of a tensor, which allows three million chunks.
_MOST_METADATA = 512 << 20


class Place(NamedTuple):
    """The place of an entry: [start, start + length) of a file."""

    file: Path
    start: int
    length: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.start + self.length


@dataclass(frozen=True)
class Saved:
    """A chunk of a tensor as it was saved.

    Attributes:
        offsets, sizes: Its extent in the Megatron tensor.
        place: Its entry.
    """

    offsets: Shape
    sizes: Shape
    place: Place


@dataclass(frozen=True)
class SavedTensor:
    """A tensor as it was saved.

    Attributes:
        dtype: The name that torch has for it.
    """

    dtype: str
    shape: Shape
    chunks: tuple[Saved, ...]


@dataclass(frozen=True)
class Metadata:
    """The content of `.metadata`: the tensors by key, and the places of all other entries."""

    tensors: Mapping[str, SavedTensor]
    objects: Mapping[str, Place]


def check_files(ends: Iterable[tuple[Path, int]], key: str) -> None:
    """Check that an entry lies within its files."""
    sizes: dict[Path, int] = {}
    for file, end in ends:
        if file not in sizes:
            if not file.is_file():
                raise ConversionError(f"{file}: missing, or no regular file; {key} is in it")
            sizes[file] = file.stat().st_size
        if end > sizes[file]:
            raise ConversionError(f"{file}: truncated; {key} does not end in it")


def read_metadata(folder: Path) -> Metadata:
    """Return the content of `.metadata`, which is a pickle; no code that it refers to is run."""
    _check_format(folder)
    file = folder / METADATA_FILE
    try:
        content = read_regular(file, _MOST_METADATA)
        check_checksum(file, checksum_of(content))
        return _plain(folder, read_pickle(content, within(METADATA)))
    except ConversionError:
        raise
    except FileNotFoundError:
        raise ConversionError(f"{file}: missing; the checkpoint is not complete") from None
    except OSError as error:
        raise ConversionError(f"{file}: {error.strerror}") from error
    except (PickleError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConversionError(f"{file}: not readable: {error}") from error


def _check_format(folder: Path) -> None:
    """Check that metadata.json has the few words that are known, and no others."""
    file = folder / "metadata.json"
    if not file.exists():
        raise ConversionError(
            f"{file}: missing; the checkpoint was not saved in full, or not in the format torch_dist; take "
            "another one"
        )
    content = read_json_object(file)
    backend = content.get("sharded_backend")
    if backend != "torch_dist":
        raise ConversionError(f"{folder}: checkpoint format {backend!r}; supported is 'torch_dist'")
    for key, value in content.items():
        if key not in _FORMAT or value != _FORMAT[key]:
            raise ConversionError(f"{file}: {key!r} is {value!r}; damaged, or of a newer version")


def _plain(folder: Path, content: Instance) -> Metadata:
    """Return the pickle's records, without the parts that are not needed."""
    state = content.state
    places = {}
    for index, info in state["storage_data"].items():
        fqn, offset = index.state["fqn"], index.state.get("offset")
        if info.state.get("transform_descriptors"):
            raise ConversionError(f"{folder / METADATA_FILE}: {fqn} is compressed or encoded")
        places[fqn, offset] = _place(folder, info.state)
    tensors, objects = {}, {}
    for key, entry in state["state_dict_metadata"].items():
        if not isinstance(key, str):
            raise TypeError(f"an entry has a {type(key).__name__} for a name")
        if entry.cls.name == "TensorStorageMetadata":
            tensors[key] = _tensor(key, entry.state, places)
        elif (key, None) in places:
            objects[key] = places[key, None]
    return Metadata(tensors, objects)


def _place(folder: Path, info: Mapping[str, Any]) -> Place:
    """Return the place of an entry, which must be in a file of the folder itself."""
    name, start, length = info["relative_path"], info["offset"], info["length"]
    if not isinstance(name, str) or Path(name).name != name or name == "..":
        raise ConversionError(f"{folder / METADATA_FILE}: it refers to {name!r}, another folder")
    if not (is_size(start) and is_size(length)):
        raise ValueError(f"an entry of {name} begins at {start!r} and has {length!r} bytes")
    return Place(folder / name, start, length)


def _tensor(
    key: str, state: Mapping[str, Any], places: Mapping[tuple[str, Any], Place]
) -> SavedTensor:
    shape = state["size"]
    chunks = []
    for chunk in state["chunks"]:
        offsets, sizes = chunk.state["offsets"], chunk.state["sizes"]
        if not (is_sizes(offsets) and is_sizes(sizes) and len(offsets) == len(sizes) == len(shape)):
            raise ValueError(f"{key} has a chunk of {sizes!r} at {offsets!r}")
        chunks.append(Saved(offsets, sizes, places[key, offsets]))
    return SavedTensor(state["properties"].state[0].name, shape, tuple(chunks))
