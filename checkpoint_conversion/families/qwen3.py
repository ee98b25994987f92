"""Qwen3 dense (Qwen3ForCausalLM): norms of query and key, no bias.

Names: transformers/models/qwen3/modeling_qwen3.py.
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
    qk_norms,
    read_decoder,
    stacked,
)
from checkpoint_conversion.families.family import Config, Family, TensorRule


def _decoder(config: Config) -> Decoder:
    required = {"attention_bias": False}
    defaults = {"head_dim": 128, "rms_norm_eps": 1e-6}
    return read_decoder(ConfigReader(config, "Qwen3", required, defaults))


def megatron_arguments(config: Config) -> dict[str, Any]:
    """Return the Megatron arguments of a configuration; see `Family`."""
    return {**decoder_arguments(_decoder(config)), "qk_layernorm": True}


def tensor_rules(config: Config) -> tuple[TensorRule, ...]:
    """Return the name table of a configuration; see `Family`."""
    model = _decoder(config)
    return model_rules(
        model, stacked(model, [*attention(model), *qk_norms(model), *dense_mlp(model)])
    )


QWEN3 = Family(("Qwen3ForCausalLM",), "qwen3", megatron_arguments, tensor_rules)
