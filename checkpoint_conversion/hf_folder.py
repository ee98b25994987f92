"""Reading a HuggingFace model folder: config.json and safetensors, as plain files.

Nothing of transformers is needed and no code of the folder runs. Tensor bytes are read with pread
at the offsets of the safetensors headers: mapped pages, which `safetensors.safe_open` uses, count
as resident memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoint_conversion.errors import ConversionError

CONFIG = "config.json"


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """The content of `folder`/config.json.

    Raises:
        ConversionError: When the folder or the file is missing, or the file is not a JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConversionError(
            f"{folder}: no such folder; give a local HuggingFace model folder "
            "(`hf download NAME --local-dir FOLDER` makes one)"
        )
    return read_json_object(folder / CONFIG)


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        ConversionError: When it is missing, unreadable or something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{file}: missing") from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content
