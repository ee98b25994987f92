"""A HuggingFace folder checked against its family's name table: a model that can be converted."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from checkpoint_conversion.engine.dtypes import DTYPES, F32, DType
from checkpoint_conversion.engine.raw_files import OpenFiles
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import Config, Family, TensorRule, family_for
from checkpoint_conversion.hf.chunks import CHUNK_BYTES, TRANSFER_BYTES, TensorChunk, chunks_of
from checkpoint_conversion.hf.folder import (
    CONFIG,
    HFTensor,
    has_weights,
    list_tensors,
    read_hf_config,
    read_weight_map,
)

_BASE, _LANGUAGE_MODEL = "model.", "language_model."
# A buffer in old Llama checkpoints, which is computed from the configuration.
_COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
# Parts that wrappers put between the names of modules.
_WRAPPED = re.compile(
    r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.", re.ASCII
)


@dataclass(frozen=True)
class HFModel:
    """A HuggingFace model whose tensors are exactly its family's.

    Attributes:
        config: The content of config.json.
        tensors: The tensors by name. One that holds all experts of a layer appears as a matrix of all rows.
        alias: The tensor that repeats another one, if any: lm_head.weight when the embeddings are tied.
        carried: The tensors that Megatron does not have, by name; an export takes them over unchanged.
    """

    folder: Path
    config: Config
    family: Family
    rules: tuple[TensorRule, ...]
    tensors: Mapping[str, HFTensor]
    alias: str | None
    carried: Mapping[str, HFTensor] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Return the tensors that are converted, in the order of the rules."""
        return list(expected_shapes(self.rules))

    @cached_property
    def dtypes(self) -> Mapping[str, DType]:
        """The dtype of each rule's tensors, by key; fp32, which holds all values, if they have several."""
        return {rule.megatron: self._common_dtype(rule) for rule in self.rules}

    @property
    def padding(self) -> int:
        """Rows that pad the vocabulary: a HuggingFace folder has none."""
        return 0

    def chunks(self, rule: TensorRule) -> Iterator[TensorChunk]:
        """Return the chunks in which to read a tensor."""
        return chunks_of(rule, self.dtypes[rule.megatron], TRANSFER_BYTES)

    def check_rest(self, files: OpenFiles) -> None:
        """Do without a check: safetensors have no checksums."""

    def dtype_of(self, rule: TensorRule) -> DType:
        """Return the single dtype of the HuggingFace tensors of a rule.

        Raises:
            ConversionError: When they have several dtypes; a Megatron tensor has one.
        """
        names = [name for piece in rule.pieces() for name in piece.hf]
        first = self.tensors[names[0]]
        for tensor in map(self.tensors.__getitem__, names):
            if tensor.dtype != first.dtype:
                raise ConversionError(
                    f"{tensor.file}: {tensor.name} is {tensor.dtype}, but {first.name} is "
                    f"{first.dtype}, and both go into {rule.megatron}; choose one with --dtype"
                )
        return DTYPES[first.dtype]

    def _common_dtype(self, rule: TensorRule) -> DType:
        dtypes = {self.tensors[name].dtype for piece in rule.pieces() for name in piece.hf}
        return F32 if len(dtypes) > 1 else DTYPES[dtypes.pop()]

    def check_alias(self) -> None:
        """Check that a second copy of a tied tensor holds the same bytes.

        Raises:
            ConversionError: When the copies differ, so that the right one is unknown.
        """
        if self.alias is None:
            return
        alias, original = (self.tensors[name] for name in self.family.tied_alias)
        step = max(1, CHUNK_BYTES // original.row_bytes)
        with OpenFiles() as files:
            for start in range(0, original.shape[0], step):
                span = files, start, min(step, original.shape[0] - start)
                if alias.dtype != original.dtype or alias.rows(*span) != original.rows(*span):
                    raise ConversionError(
                        f"{alias.file}: {alias.name} differs from {original.name}, but config.json ties "
                        "them (tie_word_embeddings): set it to false, or remove the tensor not meant"
                    )

    def read_into(
        self,
        chunk: TensorChunk,
        dtype: DType,
        into: memoryview,
        files: OpenFiles,
        finite: bool = False,
    ) -> None:
        """Read the values of a chunk in a dtype, as bytes.

        Args:
            into: A buffer of the size of the chunk.
            files: Open files, which stay open for the next call.
            finite: Refuse NaN and infinity.

        Raises:
            ConversionError: When a value is outside the range of the dtype, or a file was
                truncated.
        """
        for source, start, rows in chunk.layout:
            tensor = self.tensors[chunk.piece.hf[source]]
            kind = DTYPES[tensor.dtype]
            size = rows * tensor.row_bytes // kind.itemsize * dtype.itemsize
            part, into = into[:size], into[size:]
            data = part if kind == dtype else memoryview(bytearray(rows * tensor.row_bytes))
            tensor.read_rows_from(files, start, rows, data)
            if finite or kind != dtype:
                from checkpoint_conversion.engine.values import deliver  # needs numpy

                deliver(data, kind, part, dtype, f"{tensor.file}: {tensor.name}", finite)


def open_hf_model(folder: str | Path, allow_pickle: bool = False) -> HFModel:
    """Read config.json and the safetensors headers of a folder and check them.

    Raises:
        ConversionError: For everything that `read_hf_config`, `family_for` and `list_tensors`
            refuse, and for tensors that are missing, unknown, or of another shape or dtype.
    """
    folder = Path(folder)
    config = read_hf_config(folder)
    family = family_for(config)
    listed = list_tensors(folder, allow_pickle)
    carried = carried_tensors(family, listed)
    rules = rules_for(family, config, listed)
    expected = expected_shapes(rules)
    alias, original = family.tied_alias
    own = {name: tensor for name, tensor in listed.items() if name not in carried}
    tensors = _by_known_name(own, (*expected, alias))
    has_alias = alias in tensors and alias not in expected
    check_tensors(folder, tensors, expected | ({alias: expected[original]} if has_alias else {}))
    tensors = row_views(tensors, rules)
    return HFModel(folder, config, family, rules, tensors, alias if has_alias else None, carried)


def rules_for(family: Family, config: Config, names: Iterable[str]) -> tuple[TensorRule, ...]:
    """Return the name table that fits the tensors of a folder, in the family's usual form if none does."""
    there = set(map(_inner_name, names))
    for form in family.other_forms:
        rules = form(config)
        pieces = (piece for rule in rules for piece in rule.pieces())
        if all(_inner_name(name) in there for piece in pieces for name in piece.hf):
            return rules
    return family.tensor_rules(config)


def rules_in(folder: Path, config: Config) -> tuple[TensorRule, ...]:
    """Return the name table that fits a HuggingFace folder, which need not hold weights."""
    family = family_for(config)
    names: Iterable[str] = ()
    if family.other_forms and has_weights(folder):
        # A template may lack its shards, or hold pointers of Git LFS in their place.
        with contextlib.suppress(ConversionError):
            names = read_weight_map(folder) or list_tensors(folder)
    return rules_for(family, config, names)


def carried_tensors(family: Family, tensors: Mapping[str, HFTensor]) -> dict[str, HFTensor]:
    """Return the tensors that a family carries along, with or without `model.` in front of their names."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if any(known.startswith(family.carried) for known in (name, _BASE + name))
    }


def row_views(tensors: Mapping[str, HFTensor], rules: Iterable[TensorRule]) -> dict[str, HFTensor]:
    """Return the tensors; one that holds several pieces of a rule becomes a matrix of all their rows."""
    axes = {
        name: len(rule.packed)
        for rule in rules
        if rule.packed
        for piece in rule.pieces()
        for name in piece.hf
    }
    return {
        name: tensor.flattened(axes[name]) if name in axes else tensor
        for name, tensor in tensors.items()
    }


def known_name(name: str, known: Container[str]) -> str:
    """Return the family's name for a tensor; like transformers, accept it with or without `model.`.

    transformers also takes the language model out of a model with images.
    """
    inner = name.removeprefix(_BASE)
    candidates = (inner, name, _BASE + name, _BASE + _inner_name(name))
    return next((found for found in candidates if found in known), name)


def _inner_name(name: str) -> str:
    """Return a name without the prefixes of a whole model."""
    return name.removeprefix(_BASE).removeprefix(_LANGUAGE_MODEL)


def _by_known_name(tensors: Mapping[str, HFTensor], known: Container[str]) -> dict[str, HFTensor]:
    """Return the tensors by the family's names, without buffers that transformers computes itself."""
    found: dict[str, HFTensor] = {}
    for name, tensor in tensors.items():
        if _COMPUTED.search(name):
            continue
        key = known_name(name, known)
        if key in found:
            raise ConversionError(
                f"{tensor.file}: {name} is there twice, also as {found[key].name}"
            )
        found[key] = tensor
    return found


def expected_shapes(rules: Iterable[TensorRule]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every HuggingFace tensor, by name."""
    return {
        name: shape
        for rule in rules
        for piece in rule.pieces()
        for name, shape in zip(piece.hf, rule.hf.values(), strict=True)
    }


def _wrapper(names: Iterable[str], missing: str) -> str:
    """Explain a missing tensor by the prefix or infix that a wrapper has added to names, if one has."""
    names = list(names)
    inner = missing.removeprefix(_BASE)
    for name in names:
        for tail in (missing, inner):
            prefix = name.removesuffix(tail)
            if prefix not in (name, "") and all(other.startswith(prefix) for other in names):
                return (
                    f"; all {len(names)} names begin with {prefix!r}, which a wrapper adds (torch.compile, "
                    "data parallelism): save the model inside it, or rename the tensors"
                )
        if name != missing and _WRAPPED.sub("", name) == missing:
            return (
                f"; it is there as {name}, a name to which a wrapper has added (torch.compile, FSDP, "
                "activation checkpointing): save the model inside it, or rename the tensors"
            )
    return ""


def check_tensors(
    folder: Path,
    tensors: Mapping[str, HFTensor],
    expected: Mapping[str, tuple[int, ...]],
    source: str = CONFIG,
) -> None:
    """Check that a folder holds exactly the expected tensors.

    Args:
        folder: The folder.
        tensors: Its tensors by name.
        expected: The shape of each tensor, by name.
        source: What the shapes follow from; for messages.

    Raises:
        ConversionError: A tensor is missing, unknown, or of another shape or an unknown dtype.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise ConversionError(
                f"{folder}: no tensor {name}, which {source} calls for{_wrapper(tensors, name)}"
            )
        tensor = tensors[name]
        if tensor.shape != shape:
            raise ConversionError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)}; "
                f"{source} calls for {list(shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise ConversionError(
                f"{tensor.file}: {name} is {tensor.dtype}; supported: {', '.join(DTYPES)}"
            )
    for name, tensor in tensors.items():
        if name not in expected:
            raise ConversionError(f"{tensor.file}: unknown tensor {name}; it would be lost")
