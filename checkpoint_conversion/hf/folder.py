"""Reader of a HuggingFace model folder: config.json and safetensors, as plain files.

It needs no part of transformers, and runs no code of the folder. Tensor bytes are read with pread at
the offsets of the safetensors headers. The mapped pages of `safetensors.safe_open` would count as
resident memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from checkpoint_conversion.engine.dtypes import DTYPES
from checkpoint_conversion.engine.raw_files import OpenFiles
from checkpoint_conversion.engine.regular_files import (
    check_model_folder,
    open_regular,
    read_regular,
)
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.pickles.archive import read_archive
from checkpoint_conversion.pickles.torch_pickle import contiguous_strides, locate_tensors
from checkpoint_conversion.pickles.uses import is_size, is_sizes

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FETCH_AGAIN = "download the folder again, the HuggingFace cache skips what it has"

# Bytes of an element of each dtype that is not converted.
_OTHER_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("I32", "U32"), 4),
    **dict.fromkeys(("I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
}
_ITEM_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | _OTHER_SIZES
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
# Much deeper values break recursive functions, at Python's limit of nested calls.
_MOST_LEVELS = 100


@dataclass(frozen=True)
class HFTensor:
    """The place of a tensor in a file.

    Attributes:
        file: The shard.
        dtype: The name that safetensors uses, for example "BF16".
        shape: The shape.
        offset: First byte in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype_name(self) -> str:
        """The name that safetensors uses for the dtype."""
        return self.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a slice along the first axis."""
        return math.prod(self.shape[1:]) * _ITEM_SIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * _ITEM_SIZES[self.dtype]

    def flattened(self, axes: int) -> HFTensor:
        """Return the same tensor with its first `axes` axes and the next one as one axis of rows."""
        rows = math.prod(self.shape[: axes + 1])
        return replace(self, shape=(rows, *self.shape[axes + 1 :]))

    def read_rows_from(self, files: OpenFiles, start: int, rows: int, into: memoryview) -> None:
        """Read rows [start, start + rows) into a buffer of that size.

        Raises:
            ConversionError: When the file has become shorter.
        """
        offset = self.offset + start * self.row_bytes
        files.read(self.file, offset, into[: rows * self.row_bytes], self.name)

    def rows(self, files: OpenFiles, start: int, rows: int) -> bytearray:
        """Return the bytes of rows [start, start + rows); raises like `read_rows_from`."""
        buffer = bytearray(rows * self.row_bytes)
        self.read_rows_from(files, start, rows, memoryview(buffer))
        return buffer


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """Return the content of `folder`/config.json.

    Raises:
        ConversionError: When the folder or the file is missing, or the file is not a JSON object. Also
            when an entry of the folder is not a regular file, or the folder holds an adapter.
    """
    folder = Path(folder)
    try:
        if not folder.is_dir():
            raise ConversionError(
                f"{folder}: no such folder; give a local HuggingFace model folder "
                "(`hf download NAME --local-dir FOLDER` makes one)"
            )
        check_model_folder(folder)
        has_adapter = (folder / ADAPTER).exists()
    except OSError as error:
        raise ConversionError(f"{folder}: {error.strerror}") from error
    if has_adapter:
        raise ConversionError(
            f"{folder / ADAPTER}: the folder is an adapter on top of a model, which would be lost; merge it "
            "into the model (merge_and_unload of peft), or remove the file if it does not belong here"
        )
    return read_json_object(folder / CONFIG)


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`.

    Raises:
        ConversionError: When the file is missing, unreadable or not a JSON object.
    """
    try:
        return parse_json_object(read_regular(file), str(file))
    except FileNotFoundError:
        raise ConversionError(f"{file}: missing") from None
    except OSError as error:
        raise ConversionError(f"{file}: {error.strerror}") from error


def parse_json_object(text: bytes, origin: str) -> dict[str, Any]:
    """Return the JSON object in `text`.

    Raises:
        ConversionError: Names `origin`. The text is not a JSON object, a key occurs twice, or values
            are nested deeper than in any real description.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise ConversionError(f"{origin}: {key!r} occurs twice")
            content[key] = value
        return content

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{origin}: broken JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{origin}: expected a JSON object, found {type(content).__name__}")
    if _is_deep(content):
        raise ConversionError(f"{origin}: nested deeper than {_MOST_LEVELS} levels")
    return content


def _is_deep(content: dict[str, Any]) -> bool:
    level: list[Any] = [content]
    for _ in range(_MOST_LEVELS):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def list_tensors(folder: str | Path, allow_pickle: bool = False) -> dict[str, HFTensor]:
    """Return all tensors of a model folder, by name; only headers are read.

    Args:
        allow_pickle: Accept pytorch_model.bin where there are no safetensors.

    Raises:
        ConversionError: When there are no weights, a shard is missing, truncated or malformed, or the
            index and the shards disagree.
    """
    folder = Path(folder)
    kind = _SAFETENSORS
    if allow_pickle and not any(folder.glob("*.safetensors*")):
        kind = _PICKLES
    weight_map = read_weight_map(folder, kind)
    if weight_map is None:
        return _read_tensors(folder / kind.single)
    tensors: dict[str, HFTensor] = {}
    for shard in sorted(set(weight_map.values())):
        for name, tensor in _read_tensors(folder / shard).items():
            if name in tensors:
                raise ConversionError(f"{name} is in both {tensors[name].file} and {tensor.file}")
            if weight_map.get(name) != shard:
                where = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise ConversionError(f"{tensor.file} holds {name}; {kind.index} puts it {where}")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ConversionError(
                f"{folder / shard}: {name} is missing; {kind.index} puts it there"
            )
    return tensors


@dataclass(frozen=True)
class _Kind:
    """A file format of weights: the name of a single file, and of an index of several."""

    single: str
    index: str

    @property
    def suffix(self) -> str:
        """The end of the name of each file."""
        return Path(self.single).suffix


_SAFETENSORS = _Kind(WEIGHTS, INDEX)
_PICKLES = _Kind("pytorch_model.bin", "pytorch_model.bin.index.json")


def read_weight_map(folder: Path, kind: _Kind = _SAFETENSORS) -> dict[str, str] | None:
    """Return the shard of each tensor according to the index; None for a folder with one weights file.

    Raises:
        ConversionError: For a folder without weights, or with a malformed index.
    """
    index, single = folder / kind.index, folder / kind.single
    if not index.exists():
        if single.exists():
            return None
        raise ConversionError(f"{folder}: {_why_no_weights(folder)}")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index}: no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard.startswith("."):
            raise ConversionError(f"{index}: {name} is put in {shard!r}, not a file of this folder")
        if not shard.endswith(kind.suffix):
            raise ConversionError(f"{index}: {name} is put in {shard!r}, not a {kind.suffix} file")
    if single.exists() and kind.single not in weight_map.values():
        raise ConversionError(f"{index} does not refer to {kind.single}; remove whichever is stale")
    return weight_map


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds safetensors that `list_tensors` reads."""
    return (folder / INDEX).exists() or (folder / WEIGHTS).exists()


def _why_no_weights(folder: Path) -> str:
    for file in (folder / WEIGHTS, folder / INDEX):
        if file.is_symlink():
            return f"{file.name} is a link to {os.path.realpath(file)}, which is missing; {FETCH_AGAIN}"
    if any(folder.glob("*.safetensors")):
        return f"there are safetensors files, but neither {WEIGHTS} nor {INDEX}"
    pickled = sorted(file.name for kind in ("*.bin", "*.pth", "*.pt") for file in folder.glob(kind))
    if pickled:
        return (
            f"only pickled weights ({pickled[0]}); a conversion to Megatron reads a pytorch_model.bin with "
            "--allow-pickle (nothing in it is run), and everything else needs safetensors: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    return f"no weights: neither {WEIGHTS} nor {INDEX}"


def _missing(file: Path) -> ConversionError:
    is_link = file.is_symlink()
    where = f"a link to {os.path.realpath(file)}, which is missing" if is_link else "missing"
    return ConversionError(f"{file}: {where}; {FETCH_AGAIN}")


def _read_tensors(file: Path) -> dict[str, HFTensor]:
    return _read_pickle(file) if file.suffix == ".bin" else read_header(file)


def _read_pickle(file: Path) -> dict[str, HFTensor]:
    """Read the places of the tensors of a state dict that torch.save wrote."""
    try:
        with open(open_regular(file), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            stored = locate_tensors(read_archive(partial(_read_at, stream.fileno()), size))
    except FileNotFoundError:
        raise _missing(file) from None
    except OSError as error:
        raise ConversionError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ConversionError(f"{file}: no state dict that torch.save wrote: {error}") from error
    tensors = {}
    for name, tensor in stored.items():
        start = tensor.first * tensor.dtype.itemsize
        found = HFTensor(name, file, tensor.dtype.name, tensor.shape, tensor.offset + start)
        if (
            tensor.strides != contiguous_strides(tensor.shape)
            or start + found.nbytes > tensor.nbytes
        ):
            raise ConversionError(
                f"{file}: {name} {list(tensor.shape)} with strides {list(tensor.strides)} is not "
                "stored row by row; make safetensors of the model first"
            )
        tensors[name] = found
    return tensors


def _read_at(descriptor: int, offset: int, count: int) -> bytes:
    return os.pread(descriptor, count, offset)


def read_header(file: Path) -> dict[str, HFTensor]:
    """Return the places of the tensors of a safetensors file, by name.

    Format: 8 bytes with the length of the header, a JSON header, the data without holes.

    Raises:
        ConversionError: When the file is missing, truncated or malformed.
    """
    try:
        with open(open_regular(file), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ConversionError(f"{file}: truncated, or not a safetensors file")
            header = parse_json_object(stream.read(length), str(file))
    except FileNotFoundError:
        raise _missing(file) from None
    except OSError as error:
        raise ConversionError(f"{file}: {error.strerror}") from error
    header.pop("__metadata__", None)
    _check_extents(file, header, size - 8 - length)
    return {
        name: HFTensor(
            name=name,
            file=file,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset=8 + length + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def _check_extents(file: Path, header: Mapping[str, Any], data_bytes: int) -> None:
    """Check every entry, and that the entries fill the data exactly."""
    for name, entry in header.items():
        if not _is_entry(entry):
            raise ConversionError(f"{file}: {name} has a malformed header entry: {entry!r}")
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if start != end or stop - start != math.prod(entry["shape"]) * _ITEM_SIZES[entry["dtype"]]:
            raise ConversionError(
                f"{file}: {name} ({entry['dtype']} {entry['shape']}) has wrong data offsets "
                f"[{start}, {stop}]"
            )
        if stop > data_bytes:
            raise ConversionError(
                f"{file}: truncated: {name} ends at byte {stop} of the data, which has {data_bytes}"
            )
        end = stop
    if end != data_bytes:
        raise ConversionError(f"{file}: {data_bytes - end} bytes more than its tensors need")


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    dtype, shape, place = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    return (
        isinstance(dtype, str)
        and dtype in _ITEM_SIZES
        and isinstance(shape, list)
        and is_sizes(tuple(shape))
        and isinstance(place, list)
        and len(place) == 2
        and all(map(is_size, place))
    )
