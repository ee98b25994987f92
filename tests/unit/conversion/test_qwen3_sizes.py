"""Every published Qwen3 dense size: names and shapes are those of transformers, flags those of the config."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from checkpoint_conversion.families import family_for

# hidden size, MLP size, layers, attention heads, key/value heads, tied
SIZES = {
    "0.6B": (1024, 3072, 28, 16, 8, True),
    "1.7B": (2048, 6144, 28, 16, 8, True),
    "4B": (2560, 9728, 36, 32, 8, True),
    "8B": (4096, 12288, 36, 32, 8, False),
    "14B": (5120, 17408, 40, 40, 8, False),
    "32B": (5120, 25600, 64, 64, 8, False),
}


def published(size: str) -> dict:
    hidden, mlp, layers, heads, kv_heads, tied = SIZES[size]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_position_embeddings": 40960,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_those_of_transformers(size):
    config = published(size)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**config))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {}
    for rule in family_for(config).tensor_rules(config):
        for piece in rule.pieces():
            found |= dict(zip(piece.hf, rule.hf.values(), strict=True))
    assert found == expected


@pytest.mark.parametrize("layout", ["before transformers 5", "since transformers 5"])
@pytest.mark.parametrize("size", SIZES)
def test_flags_are_those_of_the_config(size, layout):
    hidden, mlp, layers, heads, kv_heads, tied = SIZES[size]
    config = published(size)
    if layout.startswith("since"):
        config = Qwen3Config(**config).to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
        assert "rope_theta" not in config
    arguments = family_for(config).megatron_arguments(config)
    expected = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": mlp,
        "num_attention_heads": heads,
        "num_query_groups": kv_heads,
        "kv_channels": 128,
        "rotary_base": 1000000,
        "layernorm_epsilon": 1e-6,
        "untie_embeddings_and_output_weights": not tied,
        "qk_layernorm": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "vocab_size": 151936,
    }
    assert {name: arguments[name] for name in expected} == expected
