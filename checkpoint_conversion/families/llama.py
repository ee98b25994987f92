"""Llama 3 (LlamaForCausalLM): no bias, no norms of query and key, scaled rotary frequencies.

Names: transformers/models/llama/modeling_llama.py.
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
    read_decoder,
    stacked,
)
from checkpoint_conversion.families.family import Config, Family, TensorRule


def _decoder(config: Config) -> Decoder:
    required = {"attention_bias": False, "mlp_bias": False}
    defaults = {"rms_norm_eps": 1e-6}
    return read_decoder(ConfigReader(config, "Llama", required, defaults, llama3_rope=True))


def megatron_arguments(config: Config) -> dict[str, Any]:
    """Return the Megatron arguments of a configuration; see `Family`."""
    return decoder_arguments(_decoder(config))


def tensor_rules(config: Config) -> tuple[TensorRule, ...]:
    """Return the name table of a configuration; see `Family`."""
    model = _decoder(config)
    return model_rules(model, stacked(model, [*attention(model), *dense_mlp(model)]))


LLAMA = Family(("LlamaForCausalLM",), "llama", megatron_arguments, tensor_rules)
