"""Adapters of a PEFT folder on transformers' language model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from checkpoint_conversion.errors import ConversionError

# Names in the folder of a model with a vision tower, and in transformers' language model of it alone.
LANGUAGE_MODEL, ALONE = "model.language_model.", "model."
# How PEFT says that an adapter keeps its random start, which for B is 0.
_MISSING = "Found missing adapter keys"


def with_adapters(model: Any, folder: str | Path) -> Any:
    """Return transformers' language model with the adapters of a PEFT folder, as a model of PEFT.

    PEFT goes by names. Those that it does not find leave the model as it is, with a warning.

    Raises:
        ConversionError: An adapter that the folder's options ask for is not in it by name.
    """
    from peft import PeftModel

    names = {f"^{LANGUAGE_MODEL.replace('.', '[.]')}": ALONE}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=_MISSING)
        try:
            return PeftModel.from_pretrained(model, folder, key_mapping=names)
        except Warning as error:
            raise ConversionError(
                f"{folder}: its adapters have other names than the model's projections, so that they would "
                f"have no effect ({str(error)[:200]}…); name the base that they were trained on"
            ) from error
