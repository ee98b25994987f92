"""The description of a model family that the engine needs: a name table and the Megatron arguments."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoint_conversion.families.layouts import Layout, copied, moved, rows_of

Config = Mapping[str, Any]
Shape = tuple[int, ...]

LAYERS = "decoder.layers."
# Modules with a weight, but without an `_extra_state` in a Megatron model.
_WITHOUT_EXTRA_STATE = ("word_embeddings", "output_layer", "router", "conv1d")
# A module's weight, or one part of a weight that Megatron splits in a checkpoint (`in_proj.weight.query`).
_MODULE = re.compile(r"(.+)\.weight(\.\w+)?")
# Arguments that `megatron_arguments` gives but that may change from run to run of one model: they are
# choices of training, not of the architecture.
CHANGEABLE_ARGUMENTS = frozenset(
    {
        "attention_dropout",
        "hidden_dropout",
        "make_vocab_size_divisible_by",
        "max_position_embeddings",
        "moe_aux_loss_coeff",
        "moe_router_dtype",
        "moe_router_load_balancing_type",
        "vocab_size",
    }
)


@dataclass(frozen=True)
class StackedSlice:
    """One part of a Megatron tensor: one layer's, or one expert's of a layer.

    Attributes:
        index: Position on the stacked axes, for example `(layer,)`; empty for a tensor that is not
            stacked.
        hf: Names of the HuggingFace tensors, in the order of the rule's layout.
        number: Position in each HuggingFace tensor that holds several pieces one after the other.
    """

    index: tuple[int, ...]
    hf: tuple[str, ...]
    number: int = 0


@dataclass(frozen=True)
class TensorRule:
    """One Megatron tensor and the HuggingFace tensors it is made of.

    Attributes:
        megatron: Key in the torch_dist checkpoint.
        hf: HuggingFace names with their shapes. A name that contains `{layer}` or `{expert}` exists
            once for each of them. Names without `{expert}` are of tensors that hold all experts: the
            first axis of their shapes is the experts.
        layout: Arrangement of the rows of a piece. Default: a single tensor, unchanged.
        axes: The new first axes on which the Megatron tensor stacks its pieces, with their sizes: no
            axis, `layer`, or `layer` and `expert`.
        vocabulary: Whether a row is a token, so that a Megatron checkpoint may hold more rows
            (padding).
        aliases: Other keys for the same tensor. Transformer Engine's and the local layers name some
            differently. A conversion writes all of them; a training run saves one.
    """

    megatron: str
    hf: Mapping[str, Shape]
    layout: Layout = ()
    axes: Mapping[str, int] = field(default_factory=dict)
    vocabulary: bool = False
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.layout:
            (shape,) = self.hf.values()
            object.__setattr__(self, "layout", copied(shape[len(self.packed)]))

    @property
    def stack(self) -> Shape:
        """Sizes of the stacked axes: `()`, `(layers,)` or `(layers, experts)`."""
        return tuple(self.axes.values())

    @property
    def packed(self) -> tuple[str, ...]:
        """The stacked axes that the HuggingFace tensors have themselves, as their first ones."""
        return tuple(
            axis for axis in self.axes if not any(f"{{{axis}}}" in name for name in self.hf)
        )

    @property
    def piece_shape(self) -> Shape:
        """Shape of one piece."""
        return (rows_of(self.layout), *next(iter(self.hf.values()))[len(self.packed) + 1 :])

    @property
    def megatron_shape(self) -> Shape:
        """Shape of the whole Megatron tensor, stacked axes first."""
        return (*self.stack, *self.piece_shape)

    @property
    def keys(self) -> tuple[str, ...]:
        """All names that the Megatron tensor may have."""
        return (self.megatron, *self.aliases)

    def pieces(self) -> Iterator[StackedSlice]:
        """Yield the pieces; the last stacked axis runs fastest."""
        packed = self.packed
        for index in itertools.product(*map(range, self.stack)):
            numbers = dict(zip(self.axes, index, strict=True))
            number = 0
            for axis in packed:
                number = number * self.axes[axis] + numbers[axis]
            names = tuple(name.format(**numbers) for name in self.hf)
            yield StackedSlice(index, names, number)

    def layout_of(self, piece: StackedSlice) -> Layout:
        """Return the layout of a piece; rows of packed HuggingFace tensors count through all pieces."""
        if piece.number == 0:
            return self.layout
        first = len(self.packed)
        return moved(self.layout, [piece.number * shape[first] for shape in self.hf.values()])

    def parts(self, piece: StackedSlice) -> Iterator[tuple[str, Shape]]:
        """Yield the HuggingFace tensors of a piece, each with the shape of its rows that are in the piece."""
        rows: Counter[int] = Counter()
        for block in self.layout:
            rows[block.source] += block.rows
        for source, name in enumerate(piece.hf):
            yield name, (rows[source], *self.piece_shape[1:])

    def renamed(self, key: str) -> TensorRule:
        """Return the same rule for a tensor that is named by one of its aliases."""
        return dataclasses.replace(self, megatron=key, aliases=())

    def per_layer(self) -> tuple[TensorRule, ...]:
        """Return one rule for each layer, with `decoder.layers.<number>.…` in place of a stacked axis.

        Megatron names tensors like this where the layers are not all alike.
        """
        if "layer" not in self.axes:
            return (self,)
        return tuple(self.of_layer(layer) for layer in range(self.axes["layer"]))

    def of_layer(self, layer: int) -> TensorRule:
        """Return the rule of one layer alone."""

        def numbered(key: str) -> str:
            return key.replace(LAYERS, f"{LAYERS}{layer}.", 1)

        return dataclasses.replace(
            self,
            megatron=numbered(self.megatron),
            hf={name.replace("{layer}", str(layer)): shape for name, shape in self.hf.items()},
            axes={axis: size for axis, size in self.axes.items() if axis != "layer"},
            aliases=tuple(map(numbered, self.aliases)),
        )


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        architectures: Values of `architectures` in config.json that this family converts.
        model_type: Value of `model_type`, for a config.json that names no architecture.
        megatron_arguments: Gives the configuration as Megatron argument names and values. Raises
            ConversionError for a configuration that Megatron-Core would compute differently.
        tensor_rules: Gives the name table; raises like `megatron_arguments`.
        other_forms: Other name tables of the same Megatron tensors, for folders that store them otherwise;
            for example, experts one by one in place of one tensor for all of them.
        carried: Beginnings of the names of tensors that Megatron does not have and that an export takes over
            from the template unchanged.
        tied_alias: The HuggingFace tensor that repeats another one when the embeddings are tied:
            `(alias, tensor)`.
    """

    architectures: tuple[str, ...]
    model_type: str
    megatron_arguments: Callable[[Config], dict[str, Any]]
    tensor_rules: Callable[[Config], tuple[TensorRule, ...]]
    other_forms: tuple[Callable[[Config], tuple[TensorRule, ...]], ...] = ()
    carried: tuple[str, ...] = ()
    tied_alias: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")


def extra_states(rules: Iterable[TensorRule]) -> dict[str, Shape]:
    """Return the modules with an `_extra_state` entry in a Megatron model, and the grid of its shards.

    The linear layers have one with both layer implementations. The norms that are modules of their own
    have one with Transformer Engine 2, whose RMSNorm is a fusible operation
    (transformer_engine/pytorch/ops/op.py).
    """
    modules = {
        match[1]: rule.stack or (1,)
        for rule in rules
        for key in rule.keys
        if (match := _MODULE.fullmatch(key))
    }
    return {
        module: grid
        for module, grid in modules.items()
        if module.rsplit(".", 1)[-1] not in _WITHOUT_EXTRA_STATE
    }
