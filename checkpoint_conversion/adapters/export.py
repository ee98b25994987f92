"""A checkpoint of adapters as merged weights, and as a PEFT folder.

The checkpoint holds no weight of the base: the base is read from the HuggingFace template, or from the
Megatron checkpoint that the run started from. Its hash must be the one that the run noted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from checkpoint_conversion.adapters.merge import MergedWeights, merged
from checkpoint_conversion.adapters.options import LoraOptions, adapter_rules
from checkpoint_conversion.adapters.saved import SavedAdapters, digest_of_weights
from checkpoint_conversion.engine.dtypes import DType
from checkpoint_conversion.engine.raw_files import OpenFiles
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import Config, TensorRule, family_for
from checkpoint_conversion.hf.chunks import TensorChunk
from checkpoint_conversion.hf.model import open_hf_model, rules_in
from checkpoint_conversion.hf.source import Weights
from checkpoint_conversion.torch_dist.folder import find_checkpoint
from checkpoint_conversion.torch_dist.reader import MegatronCheckpoint, open_checkpoint

# Rows that are compared of each tensor.
_COMPARED_ROWS = 16


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


def check_named_model(template: Path, config: Config, base: Path) -> None:
    """Check that a PEFT folder which names a template as its base means the adapters' base.

    Args:
        template, config, base: As in `first_difference`.

    Raises:
        ConversionError: The template is another model, or one of them cannot be read.
    """
    if (name := first_difference(template, config, base)) is not None:
        raise ConversionError(
            f"the PEFT folder would name {template} as its base, and the adapters were trained on {base}, "
            f"which has another {name}; write merged weights (--out), convert that checkpoint and give the "
            "result as --hf-template, or give --any-base"
        )


def first_difference(template: Path, config: Config, base: Path) -> str | None:
    """Return a tensor in which a HuggingFace folder and a checkpoint differ; None if they hold one model.

    Some rows of each tensor are compared, in the dtype of the checkpoint: two models that were trained
    differently differ nearly everywhere.

    Args:
        template: The HuggingFace folder.
        config: The content of its config.json.
        base: Folder of one checkpoint.

    Raises:
        ConversionError: One of them cannot be read; for example, the folder has no weights.
    """
    model, checkpoint = open_hf_model(template), open_checkpoint(base, rules_in(template, config))
    with OpenFiles() as files:
        for chunk in (chunk for rule in checkpoint.rules for chunk in _samples(rule)):
            dtype = checkpoint.dtypes[chunk.key]
            if _values(model, chunk, dtype, files) != _values(checkpoint, chunk, dtype, files):
                return chunk.piece.hf[chunk.layout[0].source]
    return None


def _samples(rule: TensorRule) -> Iterator[TensorChunk]:
    """Yield rows in the middle of the first block of each HuggingFace tensor that a Megatron tensor holds."""
    for piece in rule.pieces():
        first, seen = 0, set[int]()
        for source, _, rows in rule.layout_of(piece):
            if source not in seen:
                seen.add(source)
                count = min(rows, _COMPARED_ROWS)
                yield TensorChunk(rule, piece, first + (rows - count) // 2, count)
            first += rows


def _values(weights: Weights, chunk: TensorChunk, dtype: DType, files: OpenFiles) -> bytearray:
    data = bytearray(chunk.elements * dtype.itemsize)
    weights.read_into(chunk, dtype, memoryview(data), files)
    return data


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
    rules = family_for(config).tensor_rules(config)
    return merged(model, adapters, saved.options.scale, rules)
