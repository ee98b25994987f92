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

    PEFT goes by names. Those that it does not find leave the model as it is, with a warning. Those that it
    has no place for are left out without one.

    Raises:
        ConversionError: An adapter that the folder's options ask for is not in it by name, or one of its own
            would be left out.
    """
    from peft import PeftModel

    names = {f"^{LANGUAGE_MODEL.replace('.', '[.]')}": ALONE}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=_MISSING)
        try:
            adapted = PeftModel.from_pretrained(model, folder, key_mapping=names)
        except Warning as error:
            raise ConversionError(
                f"{folder}: its adapters have other names than the model's projections, so that they would "
                f"have no effect ({str(error)[:200]}…); name the base that they were trained on"
            ) from error
    # Only a second load returns what the first one has left out.
    left = adapted.load_adapter(folder, adapted.active_adapter, key_mapping=names).unexpected_keys
    if left:
        raise ConversionError(
            f"{folder}: PEFT leaves out {left[0]} ({len(left)} factors in all); take merged weights "
            "(--export-hf of the run, or --out of megatron_to_hf)"
        )
    return adapted
