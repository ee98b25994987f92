"""A model folder in transformers: its language model, and the adapters of a PEFT folder on it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint_conversion.errors import ConversionError

if TYPE_CHECKING:  # a conversion needs no torch
    import torch

# Names in the folder of a model with a vision tower, and in transformers' language model of it alone.
LANGUAGE_MODEL, ALONE = "model.language_model.", "model."
# How PEFT says that an adapter keeps its random start, which for B is 0.
_MISSING = "Found missing adapter keys"


def load_language_model(folder: str | Path, dtype: torch.dtype) -> Any:
    """Return the language model in a folder; no code of the folder is run, and nothing is downloaded.

    Raises:
        ConversionError: The folder lacks a tensor, which transformers would fill with random values.
        Exception: Of any class, for a folder that transformers cannot use.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # The class of the language model reads this in its part of the file, where the default is false.
    if getattr(config, "tie_word_embeddings", False):
        config.get_text_config().tie_word_embeddings = True
    # A config.json may name kernels of somebody's repository. Without a name transformers takes torch's
    # attention, or its own plain one for classes that need it, for example of Gemma 2 and gpt-oss.
    config._attn_implementation = None
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise ConversionError(
            f"{folder}: no tensor {', '.join(missing[:3])} ({len(missing)} are missing), and transformers "
            "would fill in random values; fetch or save the model again"
        )
    return model


def with_adapters(model: Any, folder: str | Path) -> Any:
    """Return transformers' language model with the adapters of a PEFT folder, as a model of PEFT.

    PEFT goes by names. Those that it does not find leave the model as it is, with a warning. Those that it
    has no place for are left out without one.

    Raises:
        ConversionError: An adapter that the folder's options ask for is not in it by name, or one of its own
            would be left out.
    """
    from peft import PeftModel

    # Of the language model alone; a model that transformers opens whole has the adapters' own names.
    is_alone = not hasattr(getattr(model, "model", None), "language_model")
    names = {f"^{LANGUAGE_MODEL.replace('.', '[.]')}": ALONE} if is_alone else None
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
