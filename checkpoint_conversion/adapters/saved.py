"""The notes of a checkpoint of adapters: their options, and the base that they belong to.

A run writes them next to the tensors, because a checkpoint of adapters holds no weight of the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from checkpoint_conversion.adapters.options import LoraOptions
from checkpoint_conversion.engine.raw_files import OpenFiles
from checkpoint_conversion.errors import ConversionError, printable
from checkpoint_conversion.hf.folder import list_tensors, read_json_object
from checkpoint_conversion.hf.stop_tokens import RUN_FILE
from checkpoint_conversion.torch_dist.metadata import METADATA_FILE, read_metadata

# Keys of the run's record in the file.
LORA, BASE = "lora", "base"
_RUN = "run"
# Bytes of each tensor that are hashed.
_BLOCK_BYTES = 4096
_DIGEST_LENGTH = 24


@dataclass(frozen=True)
class SavedAdapters:
    """The notes.

    Attributes:
        options: Options of the adapters.
        base: Folder of the base, as the run named it.
        digest: Hash of the base's weights (`digest_of_weights`).
    """

    options: LoraOptions
    base: str
    digest: str


def noted_options(options: LoraOptions) -> dict[str, Any]:
    """Return the options as JSON values, which `saved_adapters` reads."""
    return {**asdict(options), "targets": list(options.targets)}


def saved_adapters(checkpoint: Path) -> SavedAdapters | None:
    """Return the notes of a checkpoint; None for a checkpoint of whole weights.

    Args:
        checkpoint: Folder of one checkpoint.

    Raises:
        ConversionError: The notes are damaged.
    """
    file = checkpoint / RUN_FILE
    if not file.exists():
        return None
    run = read_json_object(file).get(_RUN)
    if not isinstance(run, Mapping) or not run.get(LORA):
        return None
    noted = run[LORA]
    try:
        options = LoraOptions(**{**noted, "targets": tuple(noted["targets"])})
        base = run[BASE]
        return SavedAdapters(options, str(base["path"]), str(base["digest"]))
    except (ConversionError, KeyError, TypeError) as error:
        raise ConversionError(
            f"{file}: the notes on the adapters are damaged ({printable(error)}); take another checkpoint"
        ) from error


def check_comparable(checkpoint: Path) -> None:
    """Refuse a checkpoint of adapters, which cannot be compared with a model.

    Raises:
        ConversionError: It holds adapters, or its notes are damaged.
    """
    if saved_adapters(checkpoint) is not None:
        raise ConversionError(
            f"{checkpoint} holds adapters and no weights; merge them with megatron_to_hf and compare the two "
            "HuggingFace folders"
        )


def digest_of_weights(folder: Path) -> str:
    """Return a hash that identifies the weights of a model, also after its files were copied.

    The hash takes the size of each file and a block in the middle of each tensor. A block of each is needed:
    adapters of few projections that were merged into a model leave its other tensors as they were.

    Args:
        folder: A HuggingFace folder, or a Megatron checkpoint.

    Raises:
        ConversionError: It holds no weights, or they cannot be read.
    """
    digest = sha256()
    places = sorted(_places(folder))
    for file in dict.fromkeys(file for file, *_ in places):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    with OpenFiles() as files:
        for file, start, length in places:
            block = bytearray(min(length, _BLOCK_BYTES))
            middle = start + (length - len(block)) // 2
            files.read(file, middle, memoryview(block), "weights")
            digest.update(block)
    return digest.hexdigest()[:_DIGEST_LENGTH]


def _places(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """Yield file, first byte and number of bytes of each tensor, or of each part that was saved of one."""
    if (folder / METADATA_FILE).exists():
        for tensor in read_metadata(folder).tensors.values():
            yield from (chunk.place for chunk in tensor.chunks)
    else:
        yield from ((t.file, t.offset, t.nbytes) for t in list_tensors(folder).values())
