"""Estimates of models with Gated DeltaNet layers: parameters of the name table, layouts that can run."""

from __future__ import annotations

import math

import pytest

from checkpoint_conversion.adapters.options import LoraOptions, adapter_rules
from checkpoint_conversion.families import family_for
from checkpoint_conversion.hf.model import expected_shapes
from megatron_profit.estimates.layouts import Cluster, Layout, Wish, choose, layouts, run_shape
from megatron_profit.estimates.parameter_counts import stage_parameters, trained_parameters
from megatron_profit.estimates.run_shape import model_arguments
from megatron_profit.estimates.state_activations import kept_bytes, norm_bytes

SIZES = {
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 8,
    "vocab_size": 248_320,
    "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
    },
    "tie_word_embeddings": False,
}
DENSE = {"architectures": ["Qwen3_5ForCausalLM"], "intermediate_size": 9216, **SIZES}
EXPERTS = {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 640,
    "router_aux_loss_coef": 0.001,
    **SIZES,
}
NEXT = {**EXPERTS, "architectures": ["Qwen3NextForCausalLM"]}
CONFIGS = {"dense": DENSE, "experts": EXPERTS, "next": NEXT}


def wish(name: str, **decided: object) -> Wish:
    return Wish(model_arguments(CONFIGS[name]), 8192, rows=4, decided=decided)


def elements(rules) -> int:
    return sum(math.prod(shape) for shape in expected_shapes(rules).values())


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_name_table(name):
    config = CONFIGS[name]
    rules = family_for(config).tensor_rules(config)
    assert stage_parameters(run_shape(wish(name), Layout(), 1), 0).total == elements(rules)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("targets", ["all-linear", "in_proj_qkv out_proj q_proj up_proj"])
def test_adapters_are_those_of_the_name_table(name, targets):
    if name == "next":
        targets = targets.replace("in_proj_qkv", "in_proj_qkvz")
    config, chosen = CONFIGS[name], tuple(targets.split())
    rules = adapter_rules(family_for(config).tensor_rules(config), LoraOptions(16, 32, chosen))
    run = run_shape(wish(name, lora_rank=16, lora_targets=chosen), Layout(), 1)
    assert trained_parameters(run, 0).total == elements(rules)


def test_activations_with_kernels_are_those_that_were_measured():
    """Bytes of a position that autograd kept of one layer with the functions of fla-core 0.6.0, bf16."""
    sizes = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 64,
    }
    config = DENSE | sizes
    model = family_for(config).megatron_arguments(config)
    run = run_shape(Wish(model, 512, rows=1), Layout(), 1)
    assert kept_bytes(run) == 512 * 8776
    assert norm_bytes(run) == 512 * (4 * 64 * 2 + 4 * 4)


def test_the_choice_splits_the_heads_of_the_states():
    """16 key heads: tensor x context parallelism divides them."""
    products = {
        layout.tensor_model_parallel_size * layout.context_parallel_size
        for layout in layouts(wish("dense"), Cluster(64, 80.0))
    }
    assert products
    assert all(16 % product == 0 for product in products)
    assert choose(wish("dense"), Cluster(8, 80.0)).bytes > 0
