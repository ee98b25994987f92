"""The notes of a checkpoint of adapters: their options, and the base that they belong to.

A run writes them next to the tensors, because a checkpoint of adapters holds no weight of the base.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from checkpoint_conversion.adapters.options import LoraOptions
from checkpoint_conversion.errors import ConversionError, printable
from checkpoint_conversion.hf.folder import read_json_object
from checkpoint_conversion.hf.stop_tokens import RUN_FILE

# Keys of the run's record in the file.
LORA, BASE = "lora", "base"
_RUN = "run"
# The number of blocks that are hashed in each file of weights, and their bytes.
_BLOCKS, _BLOCK_BYTES = 16, 4096
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

    The hash takes the size of each file and some blocks that are spread over it. Two models that were trained
    differently differ nearly everywhere, so these blocks suffice.

    Args:
        folder: A HuggingFace folder, or a Megatron checkpoint.
    """
    files = [*folder.glob("*.safetensors"), *folder.glob("*.distcp")]
    return _digest(sorted(files))


def _digest(files: Iterable[Path]) -> str:
    digest = sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            for block in range(_BLOCKS):
                content.seek(block * max(size - _BLOCK_BYTES, 0) // (_BLOCKS - 1))
                digest.update(content.read(_BLOCK_BYTES))
    return sha256(json.dumps(digest.hexdigest()).encode()).hexdigest()[:_DIGEST_LENGTH]
