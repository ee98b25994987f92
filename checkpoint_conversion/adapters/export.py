"""A checkpoint of adapters as merged weights, and as a PEFT folder.

The checkpoint holds no weight of the base: the base is read from the HuggingFace template, or from the
Megatron checkpoint that the run started from. Its hash must be the one that the run noted.
"""

from __future__ import annotations

from pathlib import Path

from checkpoint_conversion.adapters.merge import MergedWeights, merged
from checkpoint_conversion.adapters.options import LoraOptions, adapter_rules
from checkpoint_conversion.adapters.saved import SavedAdapters, digest_of_weights
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import Config, family_for
from checkpoint_conversion.hf.model import open_hf_model, rules_in
from checkpoint_conversion.torch_dist.folder import find_checkpoint
from checkpoint_conversion.torch_dist.reader import MegatronCheckpoint, open_checkpoint


def open_adapters(checkpoint: Path, config: Config, options: LoraOptions) -> MegatronCheckpoint:
    """Read the metadata of a checkpoint of adapters, and check it; no tensor is read.

    Args:
        checkpoint: Folder of one checkpoint.
        config: The content of the model's config.json.
        options: The options that its notes have.

    Raises:
        ConversionError: Its tensors are others than model and options call for.
    """
    return open_checkpoint(
        checkpoint, adapter_rules(family_for(config).tensor_rules(config), options)
    )


def check_base(
    checkpoint: Path, saved: SavedAdapters, template: Path, base: Path | None, any_base: bool
) -> Path:
    """Return the folder of the base of a checkpoint of adapters, after a comparison with the noted hash.

    Args:
        checkpoint, saved, template, base, any_base: As in `open_merged`.

    Raises:
        ConversionError: The base is another one.
    """
    folder = template if base is None else find_checkpoint(base)
    if not any_base and digest_of_weights(folder) != saved.digest:
        raise ConversionError(
            f"{folder} is not the base of the adapters in {checkpoint}, which were trained on {saved.base}; "
            "give that (--hf-template for a HuggingFace folder, --base for a Megatron checkpoint), or "
            "--any-base"
        )
    return folder


def open_merged(
    checkpoint: Path,
    saved: SavedAdapters,
    config: Config,
    template: Path,
    base: Path | None,
    any_base: bool = False,
) -> MergedWeights:
    """Open a checkpoint of adapters and its base; no tensor is read.

    Args:
        checkpoint: Folder of one checkpoint.
        saved: Its notes.
        config: The content of the template's config.json.
        template: HuggingFace folder of the model.
        base: The Megatron checkpoint that holds the base; None for the weights of the template.
        any_base: Whether the base may be another one than the run noted.

    Raises:
        ConversionError: The base is another one, or a folder cannot be used.
    """
    folder = check_base(checkpoint, saved, template, base, any_base)
    adapters = open_adapters(checkpoint, config, saved.options)
    model = (
        open_hf_model(template)
        if base is None
        else open_checkpoint(folder, rules_in(template, config))
    )
    return merged(model, adapters, saved.options.scale)
