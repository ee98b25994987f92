"""OLMo-2 (Olmo2ForCausalLM): norms after attention and MLP; one norm of all queries and one of all keys.

Names: transformers/models/olmo2/modeling_olmo2.py.
"""

from __future__ import annotations

from checkpoint_conversion.families.config import ConfigReader
from checkpoint_conversion.families.decoder import (
    Decoder,
    Part,
    dense_family,
    gated_mlp,
    projections,
    read_decoder,
)
from checkpoint_conversion.families.family import Config

# Megatron's `--spec`: the module and the function that give the layers. Megatron-Core has none like these.
LAYER_SPEC = ("megatron_profit.models.olmo2", "layer_spec")


def _decoder(config: Config) -> Decoder:
    required = {"attention_bias": False}
    return read_decoder(ConfigReader(config, "OLMo-2", required, {"rms_norm_eps": 1e-5}))


def _layer(model: Decoder) -> list[Part]:
    hidden = (model.hidden,)
    norms = [
        Part("self_attention.q_norm.weight", {"self_attn.q_norm.weight": (model.q,)}),
        Part("self_attention.k_norm.weight", {"self_attn.k_norm.weight": (model.kv,)}),
        Part("self_attention.post_layernorm.weight", {"post_attention_layernorm.weight": hidden}),
        Part("mlp.post_layernorm.weight", {"post_feedforward_layernorm.weight": hidden}),
    ]
    return [*projections(model), *gated_mlp(model), *norms]


OLMO2 = dense_family("Olmo2ForCausalLM", "olmo2", _decoder, _layer, {"spec": list(LAYER_SPEC)})
