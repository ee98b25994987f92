"""Tensors of a HuggingFace folder that Megatron does not have, such as a vision tower's: carried along.

They are in no Megatron checkpoint. An export copies their bytes from the template, a part at a time. A
checkpoint has notes on them, with a checksum of each, so that one that is missing or was changed is an error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint_conversion.engine.checksums import crc32
from checkpoint_conversion.engine.output import write_file
from checkpoint_conversion.engine.raw_files import OpenFiles
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import Config, Family, family_for
from checkpoint_conversion.hf.chunks import TRANSFER_BYTES
from checkpoint_conversion.hf.folder import (
    HFTensor,
    has_weights,
    list_tensors,
    read_json_object,
)
from checkpoint_conversion.hf.model import carried_tensors
from checkpoint_conversion.hf.writer import HFWriter
from checkpoint_conversion.progress import human

NOTES = "carried_tensors.json"
# The part of a config.json that describes a vision tower.
VISION = "vision_config"
_FORMAT = 1
_REMEDY = "give the folder that the checkpoint comes from"


class Note(NamedTuple):
    """What a checkpoint notes of a carried tensor; `crc32` is the checksum of its bytes, in hexadecimal."""

    dtype: str
    shape: tuple[int, ...]
    crc32: str


Notes = Mapping[str, Note]


def carried_in(folder: Path, family: Family) -> dict[str, HFTensor]:
    """Return the carried tensors of a HuggingFace folder by name; none in a folder without weights."""
    if not family.carried or not has_weights(folder):
        return {}
    return carried_tensors(family, list_tensors(folder))


def carried_to_export(template: Path, config: Config) -> dict[str, HFTensor]:
    """Return the tensors of a template that an export takes over, by name.

    Raises:
        ConversionError: The template has a vision tower by its config.json, and no weights to take it from.
    """
    if VISION in config and not has_weights(template):
        raise ConversionError(
            f"{template} holds no safetensors, and an export as {config.get('architectures')} takes over its "
            "vision tower; give the folder with the weights"
        )
    return carried_in(template, family_for(config))


def description(tensors: Mapping[str, HFTensor]) -> str:
    """Return a sentence on carried tensors.

    For example: "carried along unchanged, not trained: model.visual (153 tensors, 0.20 GB), mtp (15 tensors,
    41 MB)".
    """
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        part = name.removeprefix("model.").split(".", 1)[0]
        part = f"model.{part}" if name.startswith("model.") else part
        counts[part] += 1
        sizes[part] += tensor.nbytes
    parts = (f"{part} ({counts[part]} tensors, {human(sizes[part])})" for part in sorted(counts))
    return f"carried along unchanged, not trained: {', '.join(parts)}"


def notes_on(tensors: Mapping[str, HFTensor]) -> dict[str, Note]:
    """Return the notes on carried tensors; all of their bytes are read.

    Raises:
        ConversionError: A file cannot be read.
    """
    with OpenFiles() as files:
        return {
            name: Note(tensor.dtype, tensor.shape, _checksum(tensor, files))
            for name, tensor in tensors.items()
        }


def write_notes(folder: Path, notes: Notes) -> None:
    """Write the notes into the folder of a checkpoint; nothing is written where no tensor is carried."""
    if notes:
        tensors = {name: note._asdict() for name, note in notes.items()}
        content = {"format": _FORMAT, "tensors": tensors}
        write_file(folder / NOTES, f"{json.dumps(content, indent=1)}\n".encode())


def read_notes(checkpoint: Path) -> Notes | None:
    """Return the notes in the folder of a checkpoint; None where it has none.

    Raises:
        ConversionError: They are damaged.
    """
    file = checkpoint / NOTES
    if not file.exists():
        return None
    content = read_json_object(file)
    tensors = content.get("tensors")
    if content.get("format") != _FORMAT or not isinstance(tensors, dict):
        raise ConversionError(f"{file}: damaged, or of a newer version")
    return {name: _note(file, name, value) for name, value in tensors.items()}


def _note(file: Path, name: str, value: Any) -> Note:
    try:
        return Note(str(value["dtype"]), tuple(value["shape"]), str(value["crc32"]))
    except (KeyError, TypeError) as error:
        raise ConversionError(f"{file}: damaged at {name}") from error


def notes_at_start(folder: Path, tensors: Mapping[str, HFTensor], checkpoint: Path | None) -> Notes:
    """Return the notes that the checkpoints of a run get.

    Args:
        folder: The HuggingFace folder of the run, which need not hold weights.
        tensors: Its carried tensors by name.
        checkpoint: The checkpoint that the run starts from, if any; its notes go on, if it has some.

    Raises:
        ConversionError: A tensor is missing or another one than the checkpoint notes, or cannot be read.
    """
    known = None if checkpoint is None else read_notes(checkpoint)
    if known is None or checkpoint is None:
        return notes_on(tensors)
    if has_weights(folder):
        check_names(folder, tensors, known, checkpoint)
        check_contents(tensors, known)
    return known


def check_names(folder: Path, tensors: Mapping[str, HFTensor], notes: Notes, origin: Path) -> None:
    """Check the names, dtypes and shapes of carried tensors; no data is read.

    Args:
        folder: The HuggingFace folder of the tensors.
        tensors: The tensors by name.
        notes: The notes in a checkpoint.
        origin: The checkpoint; for messages.

    Raises:
        ConversionError: A tensor is missing, or another one than the checkpoint notes.
    """
    for name, note in notes.items():
        if name not in tensors:
            raise ConversionError(
                f"{folder}: no tensor {name}, which {origin / NOTES} lists; {_REMEDY}"
            )
        found = tensors[name]
        if (found.dtype, found.shape) != (note.dtype, note.shape):
            raise ConversionError(
                f"{found.file}: {name} is {found.dtype} {list(found.shape)}; {origin / NOTES} lists "
                f"{note.dtype} {list(note.shape)}; {_REMEDY}"
            )
    for name, found in tensors.items():
        if name not in notes:
            raise ConversionError(
                f"{found.file}: {name} is not among the tensors that {origin / NOTES} lists; {_REMEDY}"
            )


def check_contents(tensors: Mapping[str, HFTensor], notes: Notes) -> None:
    """Compare the checksums of carried tensors with notes on them.

    Raises:
        ConversionError: One differs, or a file cannot be read.
    """
    with OpenFiles() as files:
        for name, note in notes.items():
            _check(tensors[name], note, _checksum(tensors[name], files))


def copy_carried(tensors: Mapping[str, HFTensor], notes: Notes | None, writer: HFWriter) -> None:
    """Copy carried tensors to their places in a HuggingFace folder, a part at a time.

    Args:
        tensors: The tensors by name.
        notes: The notes to compare their checksums with, if there are any.
        writer: Writes them.

    Raises:
        ConversionError: A checksum differs, a file cannot be read, or the disk is full or fails.
    """
    with OpenFiles() as files:
        for name, tensor in tensors.items():
            found = 0
            for start, data in _parts(tensor, files):
                writer.write_at(name, start, data)
                found = crc32(data, found)
            if notes is not None:
                _check(tensor, notes[name], f"{found:08x}")


def _check(tensor: HFTensor, note: Note, found: str) -> None:
    if found != note.crc32:
        raise ConversionError(
            f"{tensor.file}: {tensor.name} has changed since it was noted: its checksum is {found} and was "
            f"{note.crc32}; {_REMEDY}"
        )


def _checksum(tensor: HFTensor, files: OpenFiles) -> str:
    found = 0
    for _, data in _parts(tensor, files):
        found = crc32(data, found)
    return f"{found:08x}"


def _parts(tensor: HFTensor, files: OpenFiles) -> Iterator[tuple[int, memoryview]]:
    """Yield the bytes of a tensor with their place in it; the buffer is used again."""
    buffer = memoryview(bytearray(min(TRANSFER_BYTES, tensor.nbytes)))
    for start in range(0, tensor.nbytes, TRANSFER_BYTES):
        data = buffer[: min(TRANSFER_BYTES, tensor.nbytes - start)]
        files.read(tensor.file, tensor.offset + start, data, tensor.name)
        yield start, data
