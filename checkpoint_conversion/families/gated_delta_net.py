"""Decoders with Gated DeltaNet (arXiv:2412.06464) in most layers and gated attention in the others.

Megatron names follow megatron-core 0.19's own layer (megatron/core/ssm/gated_delta_net/common.py): a
checkpoint has the parts of its fused `in_proj` and of its `conv1d` under keys of their own, so each rank
finds its heads. One name differs. Megatron's layer takes the norm of the outputs as zero-centred (1 + w),
but these models have a plain one (w), and w - 1 is not exact in bf16. It is stored as it is, under a name
that Megatron's own layer does not know, so that no other program computes with 1 + w unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from checkpoint_conversion.families.config import ConfigReader
from checkpoint_conversion.families.decoder import Decoder, Part, qk_norms
from checkpoint_conversion.families.layouts import (
    Layout,
    RowBlock,
    grouped_gated_qkv,
    part_of,
)

LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True)
class DeltaNet:
    """The sizes of the layers, and their kinds.

    Attributes:
        key_heads, value_heads: Heads of queries and keys, and of values; values are grouped by key heads.
        key_dim, value_dim: Sizes of a head.
        kernel: Length of the causal convolution.
        linear_layers: Whether each layer is a Gated DeltaNet; the others have attention.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    linear_layers: tuple[bool, ...]

    @property
    def qk(self) -> int:
        """Rows of the queries, and of the keys."""
        return self.key_heads * self.key_dim

    @property
    def v(self) -> int:
        """Rows of the values, and of the gate."""
        return self.value_heads * self.value_dim


def read_delta_net(read: ConfigReader) -> DeltaNet:
    """Read the sizes in a config.json.

    Raises:
        ConversionError: Names the key, its value and the supported values.
    """
    key_heads, value_heads = read.size("linear_num_key_heads"), read.size("linear_num_value_heads")
    if value_heads % key_heads:
        known = f"a multiple of linear_num_key_heads={key_heads}"
        raise read.refused("linear_num_value_heads", value_heads, known)
    return DeltaNet(
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=read.size("linear_key_head_dim"),
        value_dim=read.size("linear_value_head_dim"),
        kernel=read.size("linear_conv_kernel_dim"),
        linear_layers=_linear_layers(read),
    )


def _linear_layers(read: ConfigReader) -> tuple[bool, ...]:
    layers, kinds = read.size("num_hidden_layers"), read.value("layer_types")
    if kinds is None:
        interval = read.size("full_attention_interval")
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if len(kinds) != layers:
        raise read.refused("layer_types", kinds, f"a list of num_hidden_layers={layers}")
    return tuple(kind == LINEAR for kind in kinds)


def delta_net_arguments(read: ConfigReader, model: Decoder, linear: DeltaNet) -> dict[str, Any]:
    """Return the Megatron arguments of the attention layers of both kinds.

    Raises:
        ConversionError: The rotated part of a head cannot be halved.
    """
    rotated = int(model.head_dim * model.rope.fraction)
    if rotated == 0 or rotated % 2:
        known = f"a fraction of head_dim={model.head_dim} that gives an even number of dimensions"
        raise read.refused("partial_rotary_factor", model.rope.fraction, known)
    return {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": _frequency(linear.linear_layers),
        "linear_conv_kernel_dim": linear.kernel,
        "linear_key_head_dim": linear.key_dim,
        "linear_value_head_dim": linear.value_dim,
        "linear_num_key_heads": linear.key_heads,
        "linear_num_value_heads": linear.value_heads,
        "attention_output_gate": True,
        "layernorm_zero_centered_gamma": True,
        "qk_layernorm": True,
    }


def _frequency(linear_layers: tuple[bool, ...]) -> int | list[int]:
    """Return N if every N-th layer has attention, as in the published models, else a mark for each layer."""
    first = linear_layers.index(False) + 1 if False in linear_layers else 1
    if first > 1 and all(
        is_linear == ((layer + 1) % first != 0) for layer, is_linear in enumerate(linear_layers)
    ):
        return first
    return [int(is_linear) for is_linear in linear_layers]


def gated_attention(model: Decoder) -> list[Part]:
    """Return the name table of attention whose output is gated, with the norms of query and key."""
    return [
        Part(
            "self_attention.linear_qkv.layer_norm_weight",
            {"input_layernorm.weight": (model.hidden,)},
        ),
        Part(
            "self_attention.linear_qkv.weight",
            {
                "self_attn.q_proj.weight": (2 * model.q, model.hidden),
                "self_attn.k_proj.weight": (model.kv, model.hidden),
                "self_attn.v_proj.weight": (model.kv, model.hidden),
            },
            grouped_gated_qkv(model.heads, model.kv_heads, model.head_dim),
        ),
        Part(
            "self_attention.linear_proj.weight",
            {"self_attn.o_proj.weight": (model.hidden, model.q)},
        ),
        *qk_norms(model),
    ]


def delta_net(model: Decoder, linear: DeltaNet, projections: Iterable[Part]) -> list[Part]:
    """Return the name table of a Gated DeltaNet layer, given the parts of its fused projection."""
    heads, channels = linear.value_heads, 2 * linear.qk + linear.v
    convolution = {"linear_attn.conv1d.weight": (channels, 1, linear.kernel)}
    return [
        Part(
            "self_attention.in_proj.layer_norm_weight",
            {"input_layernorm.weight": (model.hidden,)},
        ),
        *projections,
        *(
            Part(f"self_attention.conv1d.weight.{name}", convolution, layout)
            for name, layout in _query_key_value(linear)
        ),
        Part("self_attention.A_log", {"linear_attn.A_log": (heads,)}),
        Part("self_attention.dt_bias", {"linear_attn.dt_bias": (heads,)}),
        Part(
            "self_attention.out_norm.plain_weight", {"linear_attn.norm.weight": (linear.value_dim,)}
        ),
        Part(
            "self_attention.out_proj.weight",
            {"linear_attn.out_proj.weight": (model.hidden, linear.v)},
        ),
    ]


def _query_key_value(linear: DeltaNet) -> list[tuple[str, Layout]]:
    qk, v = linear.qk, linear.v
    return [("query", part_of(qk)), ("key", part_of(qk, qk)), ("value", part_of(v, 2 * qk))]


def separate_projections(model: Decoder, linear: DeltaNet) -> list[Part]:
    """Return the parts of `in_proj` where q, k, v are one HuggingFace tensor, and z, b, a one each."""
    qkv = {"linear_attn.in_proj_qkv.weight": (2 * linear.qk + linear.v, model.hidden)}
    others = {
        "z": ("z", linear.v),
        "beta": ("b", linear.value_heads),
        "alpha": ("a", linear.value_heads),
    }
    return [
        *(
            Part(f"self_attention.in_proj.weight.{name}", qkv, layout)
            for name, layout in _query_key_value(linear)
        ),
        *(
            Part(
                f"self_attention.in_proj.weight.{name}",
                {f"linear_attn.in_proj_{letter}.weight": (rows, model.hidden)},
            )
            for name, (letter, rows) in others.items()
        ),
    ]


def fused_projections(model: Decoder, linear: DeltaNet) -> list[Part]:
    """Return the parts of `in_proj` where HuggingFace has q, k, v, z of each key head together, and b, a."""
    group = linear.value_heads // linear.key_heads
    values = group * linear.value_dim
    sizes = {"query": linear.key_dim, "key": linear.key_dim, "value": values, "z": values}
    qkvz = {"linear_attn.in_proj_qkvz.weight": (2 * linear.qk + 2 * linear.v, model.hidden)}
    ba = {"linear_attn.in_proj_ba.weight": (2 * linear.value_heads, model.hidden)}
    return [
        Part(
            f"self_attention.in_proj.weight.{name}",
            hf,
            _every(rows, start, total, linear.key_heads),
        )
        for hf, parts in ((qkvz, sizes), (ba, {"beta": group, "alpha": group}))
        for total in [sum(parts.values())]
        for name, rows, start in _places(parts)
    ]


def _places(parts: dict[str, int]) -> Iterable[tuple[str, int, int]]:
    """Yield each part with its rows and its first row."""
    start = 0
    for name, rows in parts.items():
        yield name, rows, start
        start += rows


def _every(rows: int, start: int, total: int, groups: int) -> Layout:
    """Lay out the same rows of each group of `total` rows."""
    return tuple(RowBlock(0, group * total + start, rows) for group in range(groups))
