"""The files and the config.json of a folder to write, decided from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoint_conversion.engine.dtypes import F32, DType
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import Config, TensorRule
from checkpoint_conversion.families.config import TEXT, text_part
from checkpoint_conversion.hf.folder import INDEX, HFTensor, read_header, read_weight_map
from checkpoint_conversion.hf.model import known_name
from checkpoint_conversion.hf.writer import (
    DEFAULT_SHARD_SIZE,
    Stored,
    TensorSpec,
    parse_size,
    split_by_size,
)

# The command recorded in a folder, whichever way it was written; --overwrite replaces its outputs.
COMMAND = "megatron_to_hf"
_DTYPE_KEYS = ("dtype", "torch_dtype")
_TIED = "tie_word_embeddings"


def files_of(
    template: Path, tensors: Mapping[str, Stored], max_shard_size: str | int | None = None
) -> dict[str, str]:
    """Choose the file of each tensor: as asked for, else as in the template, else by the default size.

    Raises:
        ConversionError: For a template whose index lacks a tensor.
    """
    if max_shard_size is not None or not (template / INDEX).exists():
        return split_by_size(tensors, parse_size(max_shard_size or DEFAULT_SHARD_SIZE))
    template_map = {
        known_name(name, tensors): shard
        for name, shard in (read_weight_map(template) or {}).items()
    }
    for name in tensors:
        if name not in template_map:
            raise ConversionError(
                f"{template / INDEX} does not hold {name}; give --max-shard-size to ignore it"
            )
    return {name: template_map[name] for name in tensors}


def tensor_specs(
    rules: Iterable[TensorRule], dtype_of: Callable[[TensorRule], DType]
) -> dict[str, TensorSpec]:
    """Return the HuggingFace tensors of a name table by name, in the dtype that each rule gets."""
    return {
        name: TensorSpec(shape, dtype_of(rule))
        for rule in rules
        for piece in rule.pieces()
        for name, shape in zip(piece.hf, rule.hf.values(), strict=True)
    }


def in_fp32_as_in(template: Path, tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return tensors to write, in fp32 where a template of half precision has them in fp32.

    For example, Qwen3.5 is published in bf16, with the decays and the norms of its Gated DeltaNets in fp32.
    A template in fp32, or one without weights, changes no dtype. Its weights serve no other purpose, so a
    file that cannot be read, for example a pointer of Git LFS, counts as absent.
    """
    found: dict[str, HFTensor] = {}
    for file in template.glob("*.safetensors"):
        with suppress(ConversionError):
            found |= read_header(file)
    stored = {known_name(name, tensors): tensor for name, tensor in found.items()}
    nbytes = Counter[str]()
    for name in tensors.keys() & stored.keys():
        nbytes[stored[name].dtype] += stored[name].nbytes
    if not nbytes or nbytes.most_common(1)[0][0] == F32.name:
        return dict(tensors)
    return {
        name: replace(tensor, dtype=F32)
        if name in stored and stored[name].dtype == F32.name
        else tensor
        for name, tensor in tensors.items()
    }


def with_dtype(config: Config, tensors: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """Return the configuration with the dtype that most bytes have.

    The key is `dtype` since transformers 4.56, and `torch_dtype` before. A key that the template has is
    kept, and follows in the part of the language model, where it has such a part.
    """
    nbytes: Counter[DType] = Counter()
    for tensor in tensors.values():
        nbytes[tensor.dtype] += tensor.nbytes
    name = nbytes.most_common(1)[0][0].torch
    keys = [key for key in _DTYPE_KEYS if key in config]
    text = text_part(config) or {}
    in_text = [key for key in _DTYPE_KEYS if key in text]
    found = {**config, **dict.fromkeys(keys or ([] if in_text else ["dtype"]), name)}
    return {**found, TEXT: {**text, **dict.fromkeys(in_text, name)}} if in_text else found


def for_every_reader(config: Config) -> dict[str, Any]:
    """Copy values to the other places where some readers look for them.

    transformers 5 writes `rope_parameters` alone. transformers 4.57 and programs that follow it look
    for `rope_theta` and `rope_scaling` next to it. Without the first they compute with 10,000; without
    the second they do not scale.

    `AutoModelForCausalLM` takes the language model out of a model with images, and looks for
    `tie_word_embeddings` in its part of the file. Without it, it draws a random output layer.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = dict(config)
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        found["rope_scaling"] = {k: value for k, value in rope.items() if k != "rope_theta"}
    text = text_part(config)
    if text is not None:
        tied = bool(config.get(_TIED))
        found[TEXT] = text if tied == bool(text.get(_TIED)) else {**text, _TIED: tied}
    return found
