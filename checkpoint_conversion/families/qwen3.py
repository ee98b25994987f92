"""Qwen3 dense (Qwen3ForCausalLM).

HuggingFace names: transformers/models/qwen3/modeling_qwen3.py. Megatron names: those of the
Transformer Engine layers, which Megatron-Core 0.19 also gives to its local layers in a checkpoint.
There, the norm before a linear layer is part of it (`linear_qkv.layer_norm_weight`).
"""

from __future__ import annotations

import math
from typing import Any

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families.family import Config, Family, TensorRule
from checkpoint_conversion.layouts import grouped_qkv, stacked_rows

# Defaults of transformers' Qwen3Config, for keys that a config.json may leave out.
_DEFAULTS = {"head_dim": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}


def check(config: Config) -> None:
    """Refuse what Megatron-Core would compute differently.

    Raises:
        ConversionError: Naming the key, its value and what is supported.
    """
    for key, supported in (
        ("attention_bias", False),
        ("use_sliding_window", False),
        ("hidden_act", "silu"),
        ("quantization_config", None),
    ):
        if config.get(key, supported) not in (supported, None):
            raise _unsupported(key, config[key], f"{key}={supported!r}")
    for kind in config.get("layer_types") or []:
        if kind != "full_attention":
            raise _unsupported("layer_types", kind, "'full_attention' in every layer")
    heads, kv_heads = _size(config, "num_attention_heads"), _kv_heads(config)
    if heads % kv_heads:
        raise _unsupported("num_key_value_heads", kv_heads, f"a divisor of {heads} attention heads")
    _rope_theta(config)


def megatron_arguments(config: Config) -> dict[str, Any]:
    """The configuration under the names that Megatron's argument parser stores it.

    `rotary_base` is an integer where it can be, the type of `--rotary-base`.
    """
    theta = _rope_theta(config)
    return {
        "num_layers": _size(config, "num_hidden_layers"),
        "hidden_size": _size(config, "hidden_size"),
        "ffn_hidden_size": _size(config, "intermediate_size"),
        "num_attention_heads": _size(config, "num_attention_heads"),
        "group_query_attention": True,
        "num_query_groups": _kv_heads(config),
        "kv_channels": _size(config, "head_dim"),
        "max_position_embeddings": _size(config, "max_position_embeddings"),
        "position_embedding_type": "rope",
        "rotary_base": int(theta) if theta == int(theta) else theta,
        "rotary_percent": 1.0,
        "use_rope_scaling": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": _positive_number(
            "rms_norm_eps", config.get("rms_norm_eps", _DEFAULTS["rms_norm_eps"])
        ),
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": True,
        "untie_embeddings_and_output_weights": not _tied(config),
        "vocab_size": _size(config, "vocab_size"),
        "make_vocab_size_divisible_by": 1,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def tensor_rules(config: Config) -> tuple[TensorRule, ...]:
    """The name table."""
    hidden, ffn = _size(config, "hidden_size"), _size(config, "intermediate_size")
    vocab, layers = _size(config, "vocab_size"), _size(config, "num_hidden_layers")
    heads, kv_heads, head_dim = (
        _size(config, "num_attention_heads"),
        _kv_heads(config),
        _size(config, "head_dim"),
    )
    q, kv = heads * head_dim, kv_heads * head_dim

    def layer(megatron: str, hf: dict[str, tuple[int, ...]], **layout: Any) -> TensorRule:
        names = {f"model.layers.{{layer}}.{name}.weight": shape for name, shape in hf.items()}
        return TensorRule(f"decoder.layers.{megatron}", names, layers=layers, **layout)

    rules = [
        TensorRule(
            "embedding.word_embeddings.weight",
            {"model.embed_tokens.weight": (vocab, hidden)},
            vocabulary=True,
        ),
        layer("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm": (hidden,)}),
        layer(
            "self_attention.linear_qkv.weight",
            {
                "self_attn.q_proj": (q, hidden),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden),
            },
            layout=grouped_qkv(heads, kv_heads, head_dim),
        ),
        layer("self_attention.q_layernorm.weight", {"self_attn.q_norm": (head_dim,)}),
        layer("self_attention.k_layernorm.weight", {"self_attn.k_norm": (head_dim,)}),
        layer("self_attention.linear_proj.weight", {"self_attn.o_proj": (hidden, q)}),
        layer("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm": (hidden,)}),
        layer(
            "mlp.linear_fc1.weight",
            {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden)},
            layout=stacked_rows(ffn, ffn),
        ),
        layer("mlp.linear_fc2.weight", {"mlp.down_proj": (hidden, ffn)}),
        TensorRule("decoder.final_layernorm.weight", {"model.norm.weight": (hidden,)}),
    ]
    if not _tied(config):
        rules.append(
            TensorRule("output_layer.weight", {"lm_head.weight": (vocab, hidden)}, vocabulary=True)
        )
    return tuple(rules)


def extra_states(config: Config) -> dict[str, int]:
    """Modules with an `_extra_state` entry, and the number of its shards.

    The linear layers have one with both layer implementations. The norms have one with Transformer
    Engine 2, whose RMSNorm is a fusible operation (transformer_engine/pytorch/ops/op.py).
    """
    layers = _size(config, "num_hidden_layers")
    per_layer = (
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "self_attention.q_layernorm",
        "self_attention.k_layernorm",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
    return {f"decoder.layers.{module}": layers for module in per_layer} | {
        "decoder.final_layernorm": 1
    }


def _size(config: Config, key: str) -> int:
    value = config.get(key, _DEFAULTS.get(key))
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _unsupported(key, value, "a positive integer")
    return value


def _kv_heads(config: Config) -> int:
    if config.get("num_key_value_heads") is None:
        return _size(config, "num_attention_heads")
    return _size(config, "num_key_value_heads")


def _tied(config: Config) -> bool:
    return bool(config.get("tie_word_embeddings", _DEFAULTS["tie_word_embeddings"]))


def _positive_number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, float | int) or not 0 < value < math.inf:
        raise _unsupported(key, value, "a positive number")
    return float(value)


def _rope_theta(config: Config) -> float:
    """The rotary base: in `rope_parameters` since transformers 5, at the top level before."""
    bases = [config.get("rope_theta")]
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        if not isinstance(rope, dict) or not _unscaled(rope):
            raise _unsupported(key, rope, "rope_type='default', that is, no scaling")
        bases.append(rope.get("rope_theta", bases[-1]))
    return _positive_number("rope_theta", bases[-1])


def _unscaled(rope: dict[str, Any]) -> bool:
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    return kind == "default" and rope.keys() <= known and rope.get("partial_rotary_factor", 1) == 1


def _unsupported(key: str, value: object, supported: str) -> ConversionError:
    return ConversionError(f"config.json has {key}={value!r}; for Qwen3, supported is {supported}")


QWEN3 = Family(
    architectures=("Qwen3ForCausalLM",),
    model_type="qwen3",
    check=check,
    megatron_arguments=megatron_arguments,
    tensor_rules=tensor_rules,
    extra_states=extra_states,
    tied_alias=("lm_head.weight", "model.embed_tokens.weight"),
)
