"""What the engine needs to know about a model family: a name table and the Megatron arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from checkpoint_conversion.layouts import Layout, copied, rows_of

Config = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """One layer's part of a Megatron tensor.

    Attributes:
        index: Position on the stacked axes, `(layer,)`; empty for a tensor that is not stacked.
        hf: Names of the HuggingFace tensors, in the order of the rule's layout.
    """

    index: tuple[int, ...]
    hf: tuple[str, ...]


@dataclass(frozen=True)
class TensorRule:
    """One Megatron tensor and the HuggingFace tensors it is made of.

    Attributes:
        megatron: Key in the torch_dist checkpoint.
        hf: HuggingFace names with their shapes. Names that contain `{layer}` exist once per layer;
            the Megatron tensor then has the layers stacked on a new first axis.
        layout: Arrangement of the rows. Default: a single tensor, unchanged.
        layers: Number of layers; read where the names contain `{layer}`.
        vocabulary: Whether a row is a token, so that a Megatron checkpoint may hold more rows
            (padding).
    """

    megatron: str
    hf: Mapping[str, Shape]
    layout: Layout = ()
    layers: int = 0
    vocabulary: bool = False

    def __post_init__(self) -> None:
        if not self.layout:
            (shape,) = self.hf.values()
            object.__setattr__(self, "layout", copied(shape[0]))

    @property
    def stack(self) -> Shape:
        """Sizes of the stacked axes: `(layers,)` or `()`."""
        return (self.layers,) if any("{layer}" in name for name in self.hf) else ()

    @property
    def piece_shape(self) -> Shape:
        """Shape of one piece."""
        return (rows_of(self.layout), *next(iter(self.hf.values()))[1:])

    @property
    def megatron_shape(self) -> Shape:
        """Shape of the whole Megatron tensor, stacked axes first."""
        return (*self.stack, *self.piece_shape)

    def pieces(self) -> Iterator[Piece]:
        """The pieces, first layer first."""
        if not self.stack:
            yield Piece((), tuple(self.hf))
            return
        for layer in range(self.layers):
            yield Piece((layer,), tuple(name.format(layer=layer) for name in self.hf))


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        architectures: Values of `architectures` in config.json that this family converts.
        model_type: Value of `model_type`, for a config.json that names no architecture.
        check: Raises ConversionError for a configuration that Megatron-Core would compute
            differently.
        megatron_arguments: The configuration as Megatron argument names and values.
        tensor_rules: The name table.
        extra_states: Modules whose `_extra_state` entry a Megatron model asks for when it loads:
            those of a layer (below `decoder.layers`), and single ones.
        tied_alias: The HuggingFace tensor that repeats another one when the embeddings are tied:
            `(alias, tensor)`.
    """

    architectures: tuple[str, ...]
    model_type: str
    check: Callable[[Config], None]
    megatron_arguments: Callable[[Config], dict[str, Any]]
    tensor_rules: Callable[[Config], tuple[TensorRule, ...]]
    extra_states: Callable[[Config], dict[str, int]]
    tied_alias: tuple[str, str]
