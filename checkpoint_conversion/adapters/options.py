"""The options of low-rank adapters, and the projections of a model that get one.

An adapter adds scale * B A x to a linear layer W x (LoRA, arXiv:2106.09685). Each HuggingFace projection has
an A [rank, in] and a B [out, rank] of its own, as in PEFT, although Megatron joins some projections in one
weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import TensorRule
from checkpoint_conversion.families.family import Shape
from checkpoint_conversion.families.layouts import Layout, RowBlock, copied, rows_of

ALL_LINEAR = "all-linear"
# PEFT's prefix of the names of a causal language model.
PREFIX = "base_model.model."
_WEIGHT = ".weight"
# The ends of the names of A and B in a PEFT folder.
A_END, B_END = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class LoraOptions:
    """The options of the adapters of a model.

    Attributes:
        rank: Rows of each A.
        alpha: Numerator of the scale.
        targets: Names of HuggingFace projections, such as `q_proj`, in the order of the model.
        dropout: Share of the inputs of A that training drops.
        rslora: Whether the scale is alpha / sqrt(rank) (arXiv:2312.03732) in place of alpha / rank.

    Raises:
        ConversionError: A value is out of range.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ConversionError(f"the rank of adapters is {self.rank!r}; it must be at least 1")
        if not _is_number(self.alpha) or self.alpha <= 0:
            raise ConversionError(f"the alpha of adapters is {self.alpha!r}; it must be above 0")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ConversionError(
                f"the dropout of adapters is {self.dropout!r}; it must be at least 0 and below 1"
            )

        if self.alpha == int(self.alpha):  # PEFT's type; a flag gives 32.0
            object.__setattr__(self, "alpha", int(self.alpha))

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Projection:
    """The adapter of a HuggingFace projection, in all layers (and experts) that a rule stacks.

    Attributes:
        target: Name of the projection, such as `q_proj`.
        weight: The HuggingFace name of its weight; it may hold `{layer}` and `{expert}`.
        shape: Shape of the weight, [out, in].
        a, b: Rules of the factors: keys in a torch_dist checkpoint, names in a PEFT folder. B has as many as
            the checkpoint has tensors for the weight: one, or query, key and value of `in_proj_qkv`.
    """

    target: str
    weight: str
    shape: Shape
    a: TensorRule
    b: tuple[TensorRule, ...]


def projections(rules: Iterable[TensorRule], options: LoraOptions) -> tuple[Projection, ...]:
    """Return the adapters of a model.

    Args:
        rules: The name table of the model.
        options: The options, whose targets need not be resolved.

    Raises:
        ConversionError: A target matches no projection, or the rank is above all matrices' dimensions.
    """
    found: dict[str, list[TensorRule]] = {}
    for rule in rules:
        for weight in _linear(rule):
            found.setdefault(weight, []).append(rule)
    known = tuple(dict.fromkeys(map(target_of, found)))
    chosen = _chosen(options.targets, known)
    made = [
        _projection(of_weight, weight, options.rank)
        for weight, of_weight in found.items()
        if target_of(weight) in chosen
    ]
    # A small one may have fewer rows than the rank, as in PEFT: `in_proj_b` of Qwen3.5-0.8B has 16.
    largest = max(made, key=lambda projection: min(projection.shape))
    if options.rank > min(largest.shape):
        raise ConversionError(
            f"the rank {options.rank} is above the dimensions of {largest.target} {list(largest.shape)}, the "
            f"largest of the targets; give at most {min(largest.shape)}"
        )
    return tuple(made)


def resolved(rules: Sequence[TensorRule], options: LoraOptions) -> LoraOptions:
    """Return the options with the names of the projections in place of `all-linear`, in the model's order.

    Raises:
        ConversionError: As `projections`.
    """
    made = projections(rules, options)
    return replace(options, targets=tuple(dict.fromkeys(p.target for p in made)))


def adapter_rules(rules: Iterable[TensorRule], options: LoraOptions) -> tuple[TensorRule, ...]:
    """Return the name table of the adapters alone; raises as `projections`."""
    return tuple(rule for p in projections(rules, options) for rule in (p.a, *p.b))


def adapted_weights(rules: Iterable[TensorRule], options: LoraOptions) -> frozenset[str]:
    """Return the names of the weights that get an adapter, of every layer; raises as `projections`.

    A name alone does not tell: `mlp.experts.down_proj` of packed experts is no projection.
    """
    pieces = (piece for p in projections(rules, options) for piece in p.a.pieces())
    return frozenset(weight_of(name) for piece in pieces for name in piece.hf)


def target_of(weight: str) -> str:
    """Return the projection of a weight: `q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return weight.removesuffix(_WEIGHT).rsplit(".", 1)[-1]


def weight_of(factor: str) -> str:
    """Return the name of the weight that the A or B with a PEFT name is for."""
    for end in (A_END, B_END):
        factor = factor.removesuffix(end)
    return factor.removeprefix(PREFIX) + _WEIGHT


def factor_b(factor: str) -> str:
    """Return the PEFT name of the B that belongs to an A; the name of a B itself."""
    return factor.removesuffix(A_END) + B_END if factor.endswith(A_END) else factor


def factor_keys(key: str, target: str) -> tuple[str, str]:
    """Return the checkpoint keys of A and B, given the key of the weight that the projection is part of.

    Where a checkpoint has the parts of a weight as tensors, as `in_proj.weight.query`, B is split like it.
    """
    module, _, part = key.partition(_WEIGHT)
    return f"{module}.{target}.lora_A", f"{module}.{target}.lora_B{part}"


def rows_of_b(rule: TensorRule, weight: str) -> Layout:
    """Return the rows of a weight's B that belong to a tensor of a checkpoint, in their order.

    A tensor with all rows of the weight has B in the order of HuggingFace; a part of it, in its own order.
    """
    source, total = list(rule.hf).index(weight), rule.hf[weight][0]
    own = tuple(RowBlock(0, start, rows) for number, start, rows in rule.layout if number == source)
    return copied(total) if rows_of(own) == total else own


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _linear(rule: TensorRule) -> list[str]:
    """Return the weights of linear layers in a rule; embeddings, router, norms and biases are none."""
    is_weight = f"{rule.megatron}.".count(f"{_WEIGHT}.") and ".router." not in rule.megatron
    if rule.vocabulary or not is_weight:
        return []
    return [name for name, shape in rule.hf.items() if len(shape) == 2]


def _chosen(targets: Sequence[str], known: Sequence[str]) -> frozenset[str]:
    if not targets:
        raise ConversionError("adapters have no target; give at least one projection")
    for target in targets:
        if target != ALL_LINEAR and target not in known:
            raise ConversionError(
                f"the target {target!r} is no projection of this model; it has {', '.join(known)} "
                f"(all of them: {ALL_LINEAR})"
            )
    return frozenset(known) if ALL_LINEAR in targets else frozenset(targets)


def _projection(rules: Sequence[TensorRule], weight: str, rank: int) -> Projection:
    first, target, module = rules[0], target_of(weight), PREFIX + weight.removesuffix(_WEIGHT)
    shape = first.hf[weight]
    a = {f"{module}{A_END}": (rank, shape[1])}
    b = {f"{module}{B_END}": (shape[0], rank)}

    def of(rule: TensorRule, number: int, hf: Mapping[str, Shape], layout: Layout) -> TensorRule:
        key, *aliases = (factor_keys(key, target)[number] for key in rule.keys)
        return TensorRule(key, hf, layout, rule.axes, aliases=tuple(aliases))

    return Projection(
        target,
        weight,
        shape,
        of(first, 0, a, copied(rank)),
        tuple(of(rule, 1, b, rows_of_b(rule, weight)) for rule in rules),
    )
