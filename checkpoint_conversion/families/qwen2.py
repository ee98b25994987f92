"""Qwen2 and Qwen2.5 dense (Qwen2ForCausalLM): query, key and value have a bias; query and key have no norms.

Names: transformers/models/qwen2/modeling_qwen2.py.
"""

from __future__ import annotations

from checkpoint_conversion.families.config import ConfigReader
from checkpoint_conversion.families.decoder import (
    Decoder,
    Part,
    attention,
    dense_family,
    dense_mlp,
    qkv_bias,
    read_decoder,
)
from checkpoint_conversion.families.family import Config


def _decoder(config: Config) -> Decoder:
    return read_decoder(ConfigReader(config, "Qwen2", defaults={"rms_norm_eps": 1e-6}))


def _layer(model: Decoder) -> list[Part]:
    return [*attention(model), *qkv_bias(model), *dense_mlp(model)]


QWEN2 = dense_family("Qwen2ForCausalLM", "qwen2", _decoder, _layer, {"add_qkv_bias": True})
