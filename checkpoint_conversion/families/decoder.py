"""The decoder that the families share: its sizes, Megatron arguments and name tables.

Megatron names follow the Transformer Engine layers. Megatron-Core 0.19 gives the same names to its
local layers in a checkpoint. The norm before a linear layer is part of that layer, for example
`linear_qkv.layer_norm_weight`. HuggingFace names follow Llama, which the families repeat
(transformers/models/llama/modeling_llama.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoint_conversion.families.config import ConfigReader, Rope
from checkpoint_conversion.families.family import LAYERS, Config, Family, Shape, TensorRule
from checkpoint_conversion.families.layouts import Layout, grouped_qkv, stacked_rows


@dataclass(frozen=True)
class Decoder:
    """The sizes of a model, and the beginning of its tensors' HuggingFace names."""

    vocab: int
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    norm_epsilon: float
    rope: Rope
    tied: bool
    base: str = "model."

    @property
    def q(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Part:
    """A line of a layer's name table, below `decoder.layers.` and `model.layers.<number>.`."""

    megatron: str
    hf: Mapping[str, Shape]
    layout: Layout = ()
    axes: Mapping[str, int] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


def read_decoder(read: ConfigReader) -> Decoder:
    """Read the sizes in a config.json.

    Raises:
        ConversionError: Names the key, its value and the supported values.
    """
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    kv_heads = heads
    if read.value("num_key_value_heads") is not None:
        kv_heads = read.size("num_key_value_heads")
    if heads % kv_heads:
        raise read.refused("num_key_value_heads", kv_heads, f"a divisor of {heads} attention heads")
    if read.value("head_dim") is not None:
        head_dim = read.size("head_dim")
    elif hidden % heads == 0:
        head_dim = hidden // heads
    else:
        raise read.refused("num_attention_heads", heads, f"a divisor of hidden_size {hidden}")
    return Decoder(
        vocab=read.size("vocab_size"),
        layers=read.size("num_hidden_layers"),
        hidden=hidden,
        ffn=read.size("intermediate_size", "moe_intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        positions=read.size("max_position_embeddings"),
        norm_epsilon=read.number("rms_norm_eps"),
        rope=read.rope(),
        tied=read.flag("tie_word_embeddings"),
    )


def decoder_arguments(model: Decoder) -> dict[str, Any]:
    """Return Megatron arguments, under the names that its argument parser stores.

    `rotary_base` is an integer where it can be, because `--rotary-base` is one.
    """
    theta, factor = model.rope.theta, model.rope.llama3_factor
    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.heads,
        "group_query_attention": True,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_dim,
        "max_position_embeddings": model.positions,
        "position_embedding_type": "rope",
        "rotary_base": int(theta) if theta == int(theta) else theta,
        "rotary_percent": model.rope.fraction,
        "use_rope_scaling": factor is not None,
        **({} if factor is None else {"rope_scaling_factor": factor}),
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": not model.tied,
        "vocab_size": model.vocab,
        "make_vocab_size_divisible_by": 1,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def attention(model: Decoder) -> list[Part]:
    """Return the name table of self-attention and the norm before it."""
    norm = {"input_layernorm.weight": (model.hidden,)}
    return [Part("self_attention.linear_qkv.layer_norm_weight", norm), *projections(model)]


def projections(model: Decoder) -> list[Part]:
    """Return the name table of self-attention's projections."""
    return [
        Part(
            "self_attention.linear_qkv.weight",
            {
                "self_attn.q_proj.weight": (model.q, model.hidden),
                "self_attn.k_proj.weight": (model.kv, model.hidden),
                "self_attn.v_proj.weight": (model.kv, model.hidden),
            },
            grouped_qkv(model.heads, model.kv_heads, model.head_dim),
        ),
        Part(
            "self_attention.linear_proj.weight",
            {"self_attn.o_proj.weight": (model.hidden, model.q)},
        ),
    ]


def qkv_bias(model: Decoder) -> list[Part]:
    """Return the biases of query, key and value, arranged like the rows of their weights."""
    return [
        Part(
            "self_attention.linear_qkv.bias",
            {
                "self_attn.q_proj.bias": (model.q,),
                "self_attn.k_proj.bias": (model.kv,),
                "self_attn.v_proj.bias": (model.kv,),
            },
            grouped_qkv(model.heads, model.kv_heads, model.head_dim),
        )
    ]


def qk_norms(model: Decoder) -> list[Part]:
    """Return the norms of each head's query and key."""
    return [
        Part("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": (model.head_dim,)}),
        Part("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": (model.head_dim,)}),
    ]


def dense_mlp(model: Decoder) -> list[Part]:
    """Return the name table of a gated MLP and the norm before it."""
    norm = {"post_attention_layernorm.weight": (model.hidden,)}
    return [Part("mlp.linear_fc1.layer_norm_weight", norm), *gated_mlp(model)]


def gated_mlp(model: Decoder) -> list[Part]:
    """Return the name table of a gated MLP's projections."""
    return _gated("mlp", "mlp", model.ffn, model.hidden)


def router(model: Decoder, experts: int) -> list[Part]:
    """Return the router of the experts, and the norm before it.

    Transformer Engine's layers call the norm `pre_mlp_layernorm.weight`. The local layers name it like
    a dense MLP's norm.
    """
    return [
        Part(
            "pre_mlp_layernorm.weight",
            {"post_attention_layernorm.weight": (model.hidden,)},
            aliases=("mlp.linear_fc1.layer_norm_weight",),
        ),
        Part("mlp.router.weight", {"mlp.gate.weight": (experts, model.hidden)}),
    ]


def separate_experts(model: Decoder, experts: int, ffn: int) -> list[Part]:
    """Return the experts where HuggingFace has tensors for each one.

    Megatron's sequential and grouped experts have the same names and shapes in a checkpoint.
    """
    return [
        dataclasses.replace(part, axes={"expert": experts})
        for part in _gated("mlp.experts.experts", "mlp.experts.{expert}", ffn, model.hidden)
    ]


def packed_experts(model: Decoder, experts: int, ffn: int) -> list[Part]:
    """Return the experts where one HuggingFace tensor holds all of a layer's; gate and up are joined."""
    hidden, axes = model.hidden, {"expert": experts}
    gate_up = {"mlp.experts.gate_up_proj": (experts, 2 * ffn, hidden)}
    down = {"mlp.experts.down_proj": (experts, hidden, ffn)}
    return [
        Part("mlp.experts.experts.linear_fc1.weight", gate_up, axes=axes),
        Part("mlp.experts.experts.linear_fc2.weight", down, axes=axes),
    ]


def shared_expert(model: Decoder, ffn: int) -> list[Part]:
    """Return the expert that every token passes, and its gate."""
    gate = {"mlp.shared_expert_gate.weight": (1, model.hidden)}
    return [
        *_gated("mlp.shared_experts", "mlp.shared_expert", ffn, model.hidden),
        Part("mlp.shared_experts.gate_weight", gate),
    ]


def _gated(megatron: str, hf: str, ffn: int, hidden: int) -> list[Part]:
    return [
        Part(
            f"{megatron}.linear_fc1.weight",
            {f"{hf}.gate_proj.weight": (ffn, hidden), f"{hf}.up_proj.weight": (ffn, hidden)},
            stacked_rows(ffn, ffn),
        ),
        Part(f"{megatron}.linear_fc2.weight", {f"{hf}.down_proj.weight": (hidden, ffn)}),
    ]


def stacked(model: Decoder, parts: Iterable[Part]) -> list[TensorRule]:
    """Return the rules of layers that are all alike: one tensor for all layers."""
    return [
        TensorRule(
            LAYERS + part.megatron,
            {f"{model.base}layers.{{layer}}.{name}": shape for name, shape in part.hf.items()},
            part.layout,
            {"layer": model.layers, **part.axes},
            aliases=tuple(LAYERS + alias for alias in part.aliases),
        )
        for part in parts
    ]


def one_by_one(model: Decoder, layers: Iterable[Iterable[Part]]) -> list[TensorRule]:
    """Return the rules of layers that are not all alike: tensors for each layer, given the parts of each."""
    return [
        rule.of_layer(layer) for layer, parts in enumerate(layers) for rule in stacked(model, parts)
    ]


def model_rules(model: Decoder, layers: Iterable[TensorRule]) -> tuple[TensorRule, ...]:
    """Return the name table of a whole model: embedding, layers, final norm and output layer."""
    table = {f"{model.base}embed_tokens.weight": (model.vocab, model.hidden)}
    rules = [
        TensorRule("embedding.word_embeddings.weight", table, vocabulary=True),
        *layers,
        TensorRule("decoder.final_layernorm.weight", {f"{model.base}norm.weight": (model.hidden,)}),
    ]
    if not model.tied:
        table = {"lm_head.weight": (model.vocab, model.hidden)}
        rules.append(TensorRule("output_layer.weight", table, vocabulary=True))
    return tuple(rules)


def dense_family(
    architecture: str,
    model_type: str,
    read: Callable[[Config], Decoder],
    layer: Callable[[Decoder], list[Part]],
    arguments: Mapping[str, Any] | None = None,
) -> Family:
    """Return a family whose layers are all alike.

    Args:
        architecture, model_type: As in `Family`.
        read: Reads the sizes in a config.json, and refuses features that Megatron-Core lacks.
        layer: Gives the name table of a layer.
        arguments: Megatron arguments that differ from the ones of `decoder_arguments`.
    """

    def megatron_arguments(config: Config) -> dict[str, Any]:
        return {**decoder_arguments(read(config)), **(arguments or {})}

    def tensor_rules(config: Config) -> tuple[TensorRule, ...]:
        model = read(config)
        return model_rules(model, stacked(model, layer(model)))

    return Family((architecture,), model_type, megatron_arguments, tensor_rules)
