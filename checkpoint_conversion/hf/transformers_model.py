"""The language model of a folder, as transformers loads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint_conversion.errors import ConversionError

if TYPE_CHECKING:  # a conversion needs no torch
    import torch


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
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        # A config.json may name kernels of somebody's repository, so this names torch's.
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise ConversionError(
            f"{folder}: no tensor {', '.join(missing[:3])} ({len(missing)} are missing), and transformers "
            "would fill in random values; fetch or save the model again"
        )
    return model
