"""Qwen2 and Qwen2.5 dense (Qwen2ForCausalLM): query, key and value have a bias; query and key have no norms.

Names: transformers/models/qwen2/modeling_qwen2.py.
"""

from __future__ import annotations

from typing import Any

from checkpoint_conversion.families.config import ConfigReader
from checkpoint_conversion.families.decoder import (
    Decoder,
    attention,
    decoder_arguments,
    dense_mlp,
    model_rules,
    qkv_bias,
    read_decoder,
    stacked,
)
from checkpoint_conversion.families.family import Config, Family, TensorRule


def _decoder(config: Config) -> Decoder:
    return read_decoder(ConfigReader(config, "Qwen2", defaults={"rms_norm_eps": 1e-6}))


def megatron_arguments(config: Config) -> dict[str, Any]:
    """Return the Megatron arguments of a configuration; see `Family`."""
    return {**decoder_arguments(_decoder(config)), "add_qkv_bias": True}


def tensor_rules(config: Config) -> tuple[TensorRule, ...]:
    """Return the name table of a configuration; see `Family`."""
    model = _decoder(config)
    return model_rules(
        model, stacked(model, [*attention(model), *qkv_bias(model), *dense_mlp(model)])
    )


QWEN2 = Family(("Qwen2ForCausalLM",), "qwen2", megatron_arguments, tensor_rules)
