"""Qwen3 dense (Qwen3ForCausalLM): norms of query and key, no bias.

Names: transformers/models/qwen3/modeling_qwen3.py.
"""

from __future__ import annotations

from checkpoint_conversion.families.config import ConfigReader
from checkpoint_conversion.families.decoder import (
    Decoder,
    Part,
    attention,
    dense_family,
    dense_mlp,
    qk_norms,
    read_decoder,
)
from checkpoint_conversion.families.family import Config


def _decoder(config: Config) -> Decoder:
    required = {"attention_bias": False}
    defaults = {"head_dim": 128, "rms_norm_eps": 1e-6}
    return read_decoder(ConfigReader(config, "Qwen3", required, defaults))


def _layer(model: Decoder) -> list[Part]:
    return [*attention(model), *qk_norms(model), *dense_mlp(model)]


QWEN3 = dense_family("Qwen3ForCausalLM", "qwen3", _decoder, _layer, {"qk_layernorm": True})
