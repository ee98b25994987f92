"""Llama 3 (LlamaForCausalLM): no bias, no norms of query and key, scaled rotary frequencies.

Names: transformers/models/llama/modeling_llama.py.
"""

from __future__ import annotations

from checkpoint_conversion.families.config import ConfigReader
from checkpoint_conversion.families.decoder import (
    Decoder,
    Part,
    attention,
    dense_family,
    dense_mlp,
    read_decoder,
)
from checkpoint_conversion.families.family import Config


def _decoder(config: Config) -> Decoder:
    required = {"attention_bias": False, "mlp_bias": False}
    defaults = {"rms_norm_eps": 1e-6}
    return read_decoder(ConfigReader(config, "Llama", required, defaults, llama3_rope=True))


def _layer(model: Decoder) -> list[Part]:
    return [*attention(model), *dense_mlp(model)]


LLAMA = dense_family("LlamaForCausalLM", "llama", _decoder, _layer)
