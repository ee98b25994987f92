"""The name table and the Megatron arguments of a HuggingFace configuration."""

from __future__ import annotations

import argparse

import pytest
import torch

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import family_for
from checkpoint_conversion.families.layouts import (
    clipped,
    copied,
    grouped_qkv,
    rows_of,
    stacked_rows,
)
from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.hf.plan import for_every_reader

# Qwen3-0.6B as published, without what does not matter here.
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
ARGUMENTS = {
    "num_layers": 28,
    "hidden_size": 1024,
    "ffn_hidden_size": 3072,
    "num_attention_heads": 16,
    "group_query_attention": True,
    "num_query_groups": 8,
    "kv_channels": 128,
    "max_position_embeddings": 40960,
    "position_embedding_type": "rope",
    "rotary_base": 1000000,
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-06,
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": True,
    "untie_embeddings_and_output_weights": False,
    "vocab_size": 151936,
    "make_vocab_size_divisible_by": 1,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}


def test_arguments_of_a_published_configuration():
    arguments = family_for(CONFIG).megatron_arguments(CONFIG)
    assert arguments == ARGUMENTS
    assert type(arguments["rotary_base"]) is int


@pytest.mark.parametrize("old_style", [False, True])
def test_arguments_of_what_transformers_saves(make_qwen3, old_style):
    config = read_hf_config(make_qwen3(old_style=old_style))
    assert ("rope_parameters" in config) is not old_style
    arguments = family_for(config).megatron_arguments(config)
    assert arguments["rotary_base"] == 500000
    assert arguments["kv_channels"] == 32
    assert arguments["untie_embeddings_and_output_weights"] is True


def test_every_argument_is_one_of_megatron():
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    defaults = vars(parser.parse_args([]))
    assert set(ARGUMENTS) <= set(defaults)
    types = {action.dest: action.type for action in parser._actions}
    for name, value in ARGUMENTS.items():
        assert types[name] in (None, type(value)), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*supported: Qwen3ForCausalLM"),
        ({"architectures": ["Qwen3ForCausalLM", "Other"]}, "Other"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({"architectures": 5}, "architectures=5; a list of names is needed"),
        ({"architectures": "Qwen3ForCausalLM"}, "a list of names is needed"),
        ({"architectures": [["Qwen3ForCausalLM"]]}, "a list of names is needed"),
        ({"model_type": "llama"}, "contradicts itself: architectures=.*, model_type='llama'"),
        ({"layer_types": 5}, "layer_types=5; .* a list"),
        ({"layer_types": [5]}, "layer_types=5; .*full_attention"),
        ({"rope_theta": 10**400}, "rope_theta=1000.*a positive number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps=1000.*a positive number"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000; .*at most 2000"),
        ({"num_attention_heads": 10**6}, "num_attention_heads=1000000; .*at most 8192"),
        ({"vocab_size": 2**31}, "vocab_size=2147483648; .*at most 2147483647"),
        ({"hidden_size": 10**400}, "hidden_size=1000.*at most 2147483647"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\]"),
        ({"rope_scaling": {"rope_type": ["default"]}}, "no scaling"),
        ({"rope_scaling": {"rope_type": "default", "type": "yarn"}}, "one value for rope_type"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1, "x": 2}}, "'x': 2"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "0.5"),
        ({"rope_theta": None}, "rope_theta=None; .*transformers takes 10000 here: write it down"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"hidden_size": None}, "hidden_size=None"),
        ({"num_hidden_layers": "28"}, "num_hidden_layers='28'"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0"),
    ],
)
def test_what_is_not_supported_is_refused(change, message):
    config = {**CONFIG, **change}
    with pytest.raises(ConversionError, match=message):
        family_for(config).megatron_arguments(config)


MOE = {
    **CONFIG,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
LLAMA = {
    **CONFIG,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "head_dim": None,
    "rope_theta": 500000.0,
}
OLMO2 = {
    **LLAMA,
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
}
OLMO3 = {**OLMO2, "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3"}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (MOE, {"num_experts_per_tok": 9}, "num_experts_per_tok=9.*at most the 8 experts"),
        (MOE, {"num_experts_per_tok": 1}, "norm_topk_prob=True.*num_experts_per_tok=1"),
        (MOE, {"mlp_only_layers": [28]}, r"mlp_only_layers=\[28\].*0 to 27"),
        (MOE, {"mlp_only_layers": list(range(28))}, "at least one layer with experts"),
        (MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        (MOE, {"num_experts": None}, "num_experts=None"),
        (MOE, {"num_experts": 10**6}, "num_experts=1000000; .*at most 100000"),
        (MOE, {"num_experts": 90_000}, "num_experts=90000; .*at most 250000 in all 28 layers"),
        (MOE, {"mlp_only_layers": [[1]]}, r"mlp_only_layers=\[\[1\]\]"),
        (MOE, {"mlp_only_layers": [1.0]}, r"mlp_only_layers=\[1.0\]"),
        (MOE, {"mlp_only_layers": 5}, "mlp_only_layers=5"),
        (MOE, {"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1"),
        (MOE, {"norm_topk_prob": "yes"}, "norm_topk_prob='yes'"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias=True"),
        (LLAMA, {"num_attention_heads": 24}, "num_attention_heads=24.*divisor of hidden_size 1024"),
        (LLAMA, {"rope_scaling": {**SCALING, "low_freq_factor": 2.0}}, "'low_freq_factor': 2.0"),
        (LLAMA, {"rope_scaling": {**SCALING, "factor": 0.5}}, "factor=0.5"),
        (LLAMA, {"rope_scaling": {**SCALING, "factor": None}}, "factor=None"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "'default' or 'llama3'"),
        (CONFIG, {"rope_scaling": SCALING}, "for Qwen3, .* no scaling"),
        (OLMO2, {"rope_scaling": SCALING}, "for OLMo-2, .* no scaling"),
        (OLMO2, {"attention_bias": True}, "attention_bias=True"),
        (OLMO2, {"layer_types": ["sliding_attention"]}, "full_attention"),
        (OLMO3, {}, "Olmo3ForCausalLM.*supported: .*Olmo2ForCausalLM"),
    ],
)
def test_what_other_families_do_not_support_is_refused(config, change, message):
    config = {**config, **change}
    with pytest.raises(ConversionError, match=message):
        family_for(config)


PLAIN = {"rope_type": "default", "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            CONFIG,
            {"rope_theta": 1e6, "rope_parameters": {**PLAIN, "rope_theta": 1e4}},
            "rope_theta=",
        ),
        (CONFIG, {"rope_theta": 1e6, "rope_scaling": {**PLAIN, "rope_theta": 1e4}}, "rope_theta="),
        (
            LLAMA,
            {"rope_scaling": SCALING, "rope_parameters": PLAIN | {"rope_theta": 5e5}},
            "factor",
        ),
        (
            LLAMA,
            {"rope_scaling": SCALING, "rope_parameters": {**SCALING, "factor": 4.0}},
            "rope_scaling=",
        ),
    ],
)
def test_a_rotary_embedding_that_is_given_twice_must_be_the_same(config, change, message):
    """transformers 4.57 takes the one, transformers 5 the other."""
    with pytest.raises(ConversionError, match=f"contradicts itself: .*{message}"):
        family_for({**config, **change})


def test_a_rotary_embedding_may_be_given_in_both_forms():
    both = {"rope_theta": 1000000, "rope_parameters": PLAIN}
    plain = family_for({**CONFIG, **both}).megatron_arguments({**CONFIG, **both})
    assert plain["rotary_base"] == 1000000
    scaled = {
        **LLAMA,
        "rope_scaling": SCALING,
        "rope_parameters": {**SCALING, "rope_theta": 500000},
    }
    arguments = family_for(scaled).megatron_arguments(scaled)
    assert (arguments["rotary_base"], arguments["rope_scaling_factor"]) == (500000, 8.0)


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"rope_theta": 1e6}, {}),
        ({"rope_theta": 1e6, "rope_scaling": None}, {}),
        ({"rope_parameters": PLAIN}, {"rope_theta": 1e6}),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6}, {}),
        (
            {"rope_parameters": {**SCALING, "rope_theta": 5e5}},
            {"rope_theta": 5e5, "rope_scaling": SCALING},
        ),
        (
            {"rope_scaling": {**SCALING, "rope_theta": 5e5}},
            {"rope_theta": 5e5, "rope_scaling": SCALING},
        ),
        ({"rope_scaling": SCALING, "rope_theta": 5e5}, {}),
        ({"text_config": {"vocab_size": 9}}, {}),
        ({"text_config": None, "tie_word_embeddings": True}, {}),
        (
            {"text_config": {"vocab_size": 9}, "tie_word_embeddings": True},
            {"text_config": {"vocab_size": 9, "tie_word_embeddings": True}},
        ),
        (
            {"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False},
            {"text_config": {"tie_word_embeddings": False}},
        ),
    ],
)
def test_an_export_says_a_value_wherever_a_reader_looks_for_it(config, added):
    assert for_every_reader(config) == config | added


def test_a_head_that_has_no_size_has_transformers_default():
    sizes = {}
    for config in (CONFIG, MOE, LLAMA):
        config = {key: value for key, value in config.items() if key != "head_dim"}
        sizes[config["model_type"]] = family_for(config).megatron_arguments(config)["kv_channels"]
    assert sizes == {"qwen3": 128, "qwen3_moe": 64, "llama": 64}


def test_layers_with_and_without_experts():
    config = {**MOE, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    arguments = family_for(config).megatron_arguments(config)
    assert arguments["moe_layer_freq"] == [0, 1, 0, 0] + 12 * [0, 1]
    plain = family_for(MOE).megatron_arguments(MOE)
    assert (plain["moe_layer_freq"], plain["moe_router_pre_softmax"]) == (1, False)


def test_qkv_is_grouped_per_kv_head():
    heads, kv_heads, head_dim, hidden = 6, 3, 5, 7
    q = torch.randn(heads * head_dim, hidden)
    k, v = torch.randn(2, kv_heads * head_dim, hidden)
    layout = grouped_qkv(heads, kv_heads, head_dim)
    expected = torch.cat([part.view(kv_heads, -1, hidden) for part in (q, k, v)], dim=1).reshape(
        -1, hidden
    )
    assert torch.equal(_merged(layout, q, k, v), expected)


def test_gate_comes_before_up():
    gate, up = torch.randn(2, 9, 4)
    assert torch.equal(_merged(stacked_rows(9, 9), gate, up), torch.cat([gate, up]))


@pytest.mark.parametrize("layout", [copied(11), stacked_rows(4, 9), grouped_qkv(4, 2, 3)])
def test_clipping_a_layout_selects_rows(layout):
    parts = [torch.randn(30, 2) for _ in range(3)]
    whole = _merged(layout, *parts)
    assert len(whole) == rows_of(layout)
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            assert torch.equal(_merged(clipped(layout, start, stop), *parts), whole[start:stop])


def _merged(layout, *parts):
    return torch.cat([parts[source][start : start + rows] for source, start, rows in layout])
