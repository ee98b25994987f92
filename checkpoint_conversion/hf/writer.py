"""Writer of a HuggingFace model folder: safetensors in a known layout, and the other files of a template.

The headers come first, from names, shapes and dtypes alone. The bytes of each tensor then go to their
place in any order, so no tensor has to be complete in memory.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TextIO

from checkpoint_conversion.engine.dtypes import DType
from checkpoint_conversion.engine.output import sync_file, write_file
from checkpoint_conversion.engine.raw_files import NewFile, OpenFiles, writing
from checkpoint_conversion.engine.regular_files import (
    CHAT_TEMPLATES,
    check_readable,
    open_regular,
    read_regular,
)
from checkpoint_conversion.engine.workers import Buffers, run_all, worker_count
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import Config
from checkpoint_conversion.hf.chunks import TensorChunk
from checkpoint_conversion.hf.folder import (
    ADAPTER_WEIGHTS,
    CONFIG,
    FETCH_AGAIN,
    INDEX,
    WEIGHTS,
    HFTensor,
)
from checkpoint_conversion.hf.source import ModelSource
from checkpoint_conversion.hf.stop_tokens import GENERATION_CONFIG, StopTokens
from checkpoint_conversion.progress import ProgressLine

DEFAULT_SHARD_SIZE = "5GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# Not copied from a template: weights in any format, code, hidden files, data, and its model card and results,
# which would describe another model.
_NOT_COPIED = re.compile(
    r"\..*|.*\.(safetensors|bin|pt|pth|ckpt|gguf|onnx|h5|msgpack|pkl|py|pyc|so|sh)"
    r"|.*\.(safetensors|bin)\.index\.json|(?i:readme.*)|.*\.(jsonl|parquet|arrow|csv|log)"
    r"|(all|train|eval|test|predict)_results\.json|trainer_state\.json|mergekit_config\.ya?ml"
)
_OF_TOKENIZER = re.compile(
    r"(tokenizer|special_tokens_map|added_tokens|vocab|merges|chat_template)\b.*"
    r"|tokenizer_config\.json"
)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to write."""

    shape: tuple[int, ...]
    dtype: DType

    @property
    def dtype_name(self) -> str:
        """The name that safetensors uses for the dtype."""
        return self.dtype.name

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class Stored(Protocol):
    """A tensor in a safetensors file: one to write, or one that is copied."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""

    @property
    def dtype_name(self) -> str:
        """The name that safetensors uses for the dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""


class TensorSizes:
    """The sizes of a folder to write; `tensors` are its tensors by name."""

    tensors: Mapping[str, TensorSpec]

    @property
    def all_tensors(self) -> Mapping[str, Stored]:
        """All tensors by name."""
        return self.tensors

    @property
    def elements(self) -> int:
        """Elements of `tensors`."""
        return sum(tensor.nbytes // tensor.dtype.itemsize for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.all_tensors.values())


class ModelSizes(TensorSizes):
    """The sizes of a model folder to write; `carried` are the tensors that are copied from a template."""

    carried: Mapping[str, HFTensor]

    @property
    def all_tensors(self) -> Mapping[str, Stored]:
        """All tensors by name, with the carried ones."""
        return {**self.tensors, **self.carried}


def parse_size(text: str | int) -> int:
    """Return the bytes of a size, for example "5GB" (10^9), "512MiB" (2^20) or a plain number.

    Raises:
        ConversionError: When the text is not a positive size.
    """
    pattern = r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMG]I?B)?"
    match = re.fullmatch(pattern, str(text)[:40].strip().upper(), re.ASCII)
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise ConversionError(
            f"shard size {str(text)[:40]!r} is not a positive number with KB, MB, GB, MiB or GiB, such as "
            f"--max-shard-size {DEFAULT_SHARD_SIZE}"
        )
    return size


def split_by_size(tensors: Mapping[str, Stored], limit: int) -> dict[str, str]:
    """Fill one file after the other, layer by layer; return the file of each tensor.

    A tensor larger than `limit` has a file of its own.
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name in sorted(tensors, key=_by_number):
        tensor = tensors[name]
        if shards[-1] and used + tensor.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    if len(shards) == 1:
        return dict.fromkeys(tensors, WEIGHTS)
    return {
        name: f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number, names in enumerate(shards, 1)
        for name in names
    }


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


class HFWriter:
    """Writer of tensors into the safetensors files of a folder.

    Args:
        folder: An existing folder.
        tensors: All tensors by name.
        weight_map: The file of each tensor.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, Stored], weight_map: Mapping[str, str]
    ) -> None:
        self._tensors = tensors
        self._places: dict[str, tuple[NewFile, int]] = {}
        self._files: list[NewFile] = []
        for shard in sorted(set(weight_map.values())):
            self._create(folder / shard, sorted(n for n in tensors if weight_map[n] == shard))
        if set(weight_map.values()) not in ({WEIGHTS}, {ADAPTER_WEIGHTS}):
            write_file(folder / INDEX, _index(tensors, weight_map))

    def write_at(self, name: str, start: int, data: memoryview) -> None:
        """Write bytes of a tensor, from its byte `start` on; several threads may do so.

        Raises:
            ConversionError: When the file cannot be written; for example, the disk is full.
        """
        file, offset = self._places[name]
        file.write_at(offset + start, data)

    def flush(self) -> None:
        """Bring all bytes to the disk.

        Raises:
            ConversionError: When some bytes did not get there.
        """
        for file in self._files:
            file.flush()

    def __enter__(self) -> HFWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def _create(self, file: Path, names: list[str]) -> None:
        """Write the header of a file and note the place of each tensor."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            tensor = self._tensors[name]
            header[name] = {
                "dtype": tensor.dtype_name,
                "shape": list(tensor.shape),
                "data_offsets": [end, end + tensor.nbytes],
            }
            end += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
        new = NewFile(file)
        self._files.append(new)
        new.write_at(0, memoryview(len(text).to_bytes(8, "little") + text))
        new.resize(8 + len(text) + end)
        for name in names:
            self._places[name] = (new, 8 + len(text) + header[name]["data_offsets"][0])


def write_tensors(
    checkpoint: ModelSource,
    tensors: Mapping[str, TensorSpec],
    writer: HFWriter,
    check_finite: bool = False,
    workers: int | None = None,
    progress: TextIO | None = None,
) -> None:
    """Write all tensors of a checkpoint to their places in a HuggingFace folder.

    Args:
        checkpoint: The checkpoint.
        tensors: The tensors to write, by HuggingFace name.
        writer: Writes them.
        check_finite: Refuse NaN and infinity.
        workers: Number of threads; None for one per core, at most 8.
        progress: Stream for progress lines.

    Raises:
        ConversionError: A file cannot be read or written, or a value is outside the range of its dtype.
    """
    chunks = (chunk for rule in checkpoint.rules for chunk in checkpoint.chunks(rule))
    buffers = Buffers()
    counter = ProgressLine(
        len(tensors), sum(tensor.nbytes for tensor in tensors.values()), progress
    )
    with OpenFiles() as files:

        def export(whole: TensorChunk) -> None:
            for chunk, dtype in _by_dtype(whole, tensors):
                data = buffers.first(chunk.elements * dtype.itemsize)
                row_bytes = len(data) // chunk.rows
                checkpoint.read_into(chunk, dtype, data, files, check_finite)
                for source, start, rows in chunk.layout:
                    part, data = data[: rows * row_bytes], data[rows * row_bytes :]
                    writer.write_at(chunk.piece.hf[source], start * row_bytes, part)
                    counter.add(chunk.piece.hf[source], len(part))

        run_all(export, chunks, worker_count(workers))
        checkpoint.check_rest(files)
        writer.flush()
        counter.finish()


def _by_dtype(
    chunk: TensorChunk, tensors: Mapping[str, TensorSpec]
) -> Iterator[tuple[TensorChunk, DType]]:
    """Cut a chunk where the dtype to write changes.

    For example, a template may hold a layer's keys in fp32 and its queries in bf16.
    """
    dtypes = [tensors[name].dtype for name in chunk.piece.hf]
    start = chunk.start
    for dtype, blocks in itertools.groupby(chunk.layout, lambda block: dtypes[block.source]):
        rows = sum(block.rows for block in blocks)
        yield replace(chunk, start=start, rows=rows), dtype
        start += rows


def copy_artifacts(template: Path, folder: Path, stops: StopTokens) -> None:
    """Copy the files of a model folder besides weights, for example tokenizer, generation config and licence.

    Left out are weights in any format, code, the model card, hidden files and subfolders, except the
    folder of additional chat templates. `stops` gives config.json. If training has taught another stop
    token, it gives generation_config.json too.

    Raises:
        ConversionError: For a link that leaves the template (see `artifacts`).
    """
    written = {CONFIG: stops.config}
    if stops.generation is not None:
        written[GENERATION_CONFIG] = stops.generation
    for file in artifacts(template):
        if file.name in written:
            continue
        target = folder / file.relative_to(template)
        target.parent.mkdir(exist_ok=True)
        with writing(target):
            _copy(file, target)
        sync_file(target)
    for name, content in written.items():
        write_file(folder / name, json_text(content))


def json_text(content: Config) -> bytes:
    """Return the bytes of a JSON file of a model folder."""
    return f"{json.dumps(content, indent=2, ensure_ascii=False)}\n".encode()


def artifacts(template: Path) -> list[Path]:
    """Return the files of a template that `copy_artifacts` copies.

    Raises:
        ConversionError: For a link that leaves the template, and a file that cannot be read.
    """
    files = list(_small_files(template))
    for file in files:
        check_link(file, template)
        check_readable(file)
    return files


def _small_files(template: Path) -> Iterator[Path]:
    """Yield the files besides weights, code, config.json and those that an export writes itself."""
    for entry in sorted([*template.iterdir(), *(template / CHAT_TEMPLATES).glob("*.jinja")]):
        if entry.name != CONFIG and not _NOT_COPIED.fullmatch(entry.name) and not entry.is_dir():
            yield entry


def tokenizer_files(template: Path) -> dict[str, bytes]:
    """Return the files of a template's tokenizer and its chat templates, by their names inside.

    Returns:
        None of them, if one leaves the template or cannot be read: a part of them could be another tokenizer.
    """
    found = {}
    for file in _small_files(template):
        if file.parent.name == CHAT_TEMPLATES or _OF_TOKENIZER.fullmatch(file.name):
            try:
                check_link(file, template)
                found[str(file.relative_to(template))] = read_regular(file)
            except (ConversionError, OSError):
                return {}
    return found


def _copy(file: Path, target: Path) -> None:
    with open(open_regular(file), "rb") as source, target.open("xb") as copy:
        shutil.copyfileobj(source, copy)


def check_link(file: Path, template: Path) -> None:
    """Refuse a link to a file outside of the template.

    The HuggingFace cache is made of links: `snapshots/<revision>/<file>` points into `blobs` of the
    same repository, which is allowed.

    Raises:
        ConversionError: Names the link and its target.
    """
    target = Path(os.path.realpath(file))
    if not target.exists():
        raise ConversionError(f"{file} is a link to {target}, which is missing; {FETCH_AGAIN}")
    home = template.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parents[1] / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise ConversionError(
            f"{file} is a link to {target}, outside of the template; replace it by the file"
        )


def _index(tensors: Mapping[str, Stored], weight_map: Mapping[str, str]) -> bytes:
    total = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()
