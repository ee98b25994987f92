"""Every published size: names and shapes are those of transformers, flags those of the config, and a dry run
finds every tensor in headers of the full size, without data."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from checkpoint_conversion.engine.dtypes import BF16
from checkpoint_conversion.families import family_for
from checkpoint_conversion.hf.model import expected_shapes
from checkpoint_conversion.hf.writer import HFWriter, TensorSpec, parse_size, split_by_size
from checkpoint_conversion.hf_to_megatron import plan_import

# hidden size, MLP size, layers, attention heads, key/value heads, vocabulary, tied
QWEN3 = {
    "0.6B": (1024, 3072, 28, 16, 8, 151936, True),
    "1.7B": (2048, 6144, 28, 16, 8, 151936, True),
    "4B": (2560, 9728, 36, 32, 8, 151936, True),
    "8B": (4096, 12288, 36, 32, 8, 151936, False),
    "14B": (5120, 17408, 40, 40, 8, 151936, False),
    "32B": (5120, 25600, 64, 64, 8, 151936, False),
}
QWEN3_MOE = {
    "30B-A3B": (2048, 6144, 48, 32, 4, 151936, False),
    "235B-A22B": (4096, 12288, 94, 64, 4, 151936, False),
}
QWEN25 = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}
LLAMA = {
    "3.1-8B": (4096, 14336, 32, 32, 8, 128256, False),
    "3.1-70B": (8192, 28672, 80, 64, 8, 128256, False),
    "3.2-1B": (2048, 8192, 16, 32, 8, 128256, True),
    "3.2-3B": (3072, 8192, 28, 24, 8, 128256, True),
}
OLMO2 = {
    "0425-1B": (2048, 8192, 16, 16, 16, 100352, False),
    "1124-7B": (4096, 11008, 32, 32, 32, 100352, False),
    "1124-13B": (5120, 13824, 40, 40, 40, 100352, False),
    "0325-32B": (5120, 27648, 64, 40, 8, 100352, False),
}
EXPERT_FFN = {"30B-A3B": 768, "235B-A22B": 1536}
# Parameters in all, as the model cards give them (tied embeddings count once).
PARAMETERS = {
    "Qwen3 0.6B": 0.6e9,
    "Qwen3 14B": 14.8e9,
    "Qwen3Moe 30B-A3B": 30.5e9,
    "Qwen3Moe 235B-A22B": 235e9,
    "Qwen2 7B": 7.61e9,
    "Qwen2 72B": 72.7e9,
    "Llama 3.1-8B": 8.03e9,
    "Llama 3.2-1B": 1.23e9,
    "Olmo2 0425-1B": 1.48e9,
    "Olmo2 1124-7B": 7.30e9,
    "Olmo2 1124-13B": 13.7e9,
    "Olmo2 0325-32B": 32.2e9,
}
_COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
}
_QWEN = {"rope_scaling": None, "rope_theta": 1000000, "rms_norm_eps": 1e-06}
_SIZES = {"Qwen3": QWEN3, "Qwen3Moe": QWEN3_MOE, "Qwen2": QWEN25, "Llama": LLAMA, "Olmo2": OLMO2}
MODELS = [(kind, size) for kind, sizes in _SIZES.items() for size in sizes]


def published(kind: str, size: str) -> dict:
    """config.json as published."""
    hidden, mlp, layers, heads, kv_heads, vocab, tied = _SIZES[kind][size]
    shape = {
        "architectures": [f"{kind}ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }
    return {**_COMMON, **shape, **_own(kind, size, layers)}


def _own(kind: str, size: str, layers: int) -> dict:
    window = {"max_window_layers": layers, "use_sliding_window": False}
    if kind == "Qwen3":
        own = {"model_type": "qwen3", "head_dim": 128, "sliding_window": None}
        return {**_QWEN, **window, **own, "max_position_embeddings": 40960}
    if kind == "Qwen3Moe":
        experts = {
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": EXPERT_FFN[size],
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": 0.001,
            "output_router_logits": False,
        }
        own = {"model_type": "qwen3_moe", "head_dim": 128, "sliding_window": None}
        return {**_QWEN, **window, **own, **experts, "max_position_embeddings": 40960}
    if kind == "Qwen2":
        own = {"model_type": "qwen2", "sliding_window": 131072, "max_position_embeddings": 131072}
        return {**_QWEN, **window, **own}
    if kind == "Olmo2":
        own = {"model_type": "olmo2", "rope_theta": 500000, "max_position_embeddings": 4096}
        return {**_QWEN, **own, "eos_token_id": 100257, "pad_token_id": 100277}
    scaling = {
        "factor": 32.0 if size.startswith("3.2") else 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    own = {"model_type": "llama", "mlp_bias": False, "pretraining_tp": 1, "rope_theta": 500000.0}
    if size.startswith("3.2"):
        own["head_dim"] = {"3.2-1B": 64, "3.2-3B": 128}[size]
    return {
        **own,
        "rope_scaling": scaling,
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 131072,
    }


def _transformers_shapes(kind: str, config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes that transformers has, its fused experts taken apart as in published files."""
    with torch.device("meta"):
        read = getattr(transformers, f"{kind}Config").from_dict(config)
        model = getattr(transformers, f"{kind}ForCausalLM")(read)
    shapes = {}
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            shapes[name] = tuple(parameter.shape)
            continue
        experts, rows, columns = parameter.shape
        prefix, part = name.rsplit(".", 1)
        parts, cut = (["gate", "up"], 2) if part == "gate_up_proj" else (["down"], 1)
        for expert in range(experts):
            for own in parts:
                shapes[f"{prefix}.{expert}.{own}_proj.weight"] = (rows // cut, columns)
    return shapes


@pytest.mark.parametrize(("kind", "size"), MODELS)
def test_names_and_shapes_are_those_of_transformers(kind, size):
    config = published(kind, size)
    found = expected_shapes(family_for(config).tensor_rules(config))
    assert found == _transformers_shapes(kind, config)
    total = sum(torch.Size(shape).numel() for shape in found.values())
    if f"{kind} {size}" in PARAMETERS:
        assert total == pytest.approx(PARAMETERS[f"{kind} {size}"], rel=0.01)


@pytest.mark.parametrize("size", OLMO2)
def test_the_names_of_olmo2_are_those_of_the_published_index(size):
    config = published("Olmo2", size)
    own = [f"self_attn.{part}" for part in ("q_norm", "k_norm")]
    own += [f"self_attn.{part}_proj" for part in "qkvo"]
    own += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    own += ["post_attention_layernorm", "post_feedforward_layernorm"]
    layers = range(config["num_hidden_layers"])
    names = {f"model.layers.{layer}.{part}.weight" for layer in layers for part in own}
    names |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert expected_shapes(family_for(config).tensor_rules(config)).keys() == names


@pytest.mark.parametrize("layout", ["before transformers 5", "since transformers 5"])
@pytest.mark.parametrize(("kind", "size"), MODELS)
def test_flags_are_those_of_the_config(kind, size, layout):
    hidden, mlp, layers, heads, kv_heads, vocab, tied = _SIZES[kind][size]
    config = published(kind, size)
    head_dim = config.get("head_dim", hidden // heads)
    theta, epsilon = int(config["rope_theta"]), config["rms_norm_eps"]
    if layout.startswith("since"):
        read = getattr(transformers, f"{kind}Config").from_dict(config)
        config = read.to_dict() | {"architectures": [f"{kind}ForCausalLM"]}
        assert "rope_theta" not in config
    arguments = family_for(config).megatron_arguments(config)
    expected = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": mlp,
        "num_attention_heads": heads,
        "num_query_groups": kv_heads,
        "kv_channels": head_dim,
        "rotary_base": theta,
        "layernorm_epsilon": epsilon,
        "untie_embeddings_and_output_weights": not tied,
        "qk_layernorm": kind.startswith("Qwen3"),
        "add_qkv_bias": kind == "Qwen2",
        "use_rope_scaling": kind == "Llama",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "vocab_size": vocab,
    }
    if kind == "Llama":
        expected["rope_scaling_factor"] = 32.0 if size.startswith("3.2") else 8.0
    if kind == "Qwen3Moe":
        expected |= {
            "num_experts": 128,
            "moe_router_topk": 8,
            "moe_ffn_hidden_size": EXPERT_FFN[size],
            "moe_layer_freq": 1,
            "moe_router_pre_softmax": False,
            "moe_router_score_function": "softmax",
            "moe_aux_loss_coeff": 0.001,
        }
    assert {name: arguments[name] for name in expected} == expected
    layers = ["megatron_profit.models.olmo2", "layer_spec"] if kind == "Olmo2" else None
    assert arguments.get("spec") == layers


@pytest.mark.parametrize(
    ("kind", "size", "nbytes"),
    [("Qwen3Moe", "30B-A3B", 61064245248), ("Llama", "3.1-8B", 16060522496)],
)
def test_dry_run_of_full_size_headers(tmp_path, kind, size, nbytes):
    """Files of the published size whose data are holes."""
    config = published(kind, size)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = expected_shapes(family_for(config).tensor_rules(config))
    tensors = {name: TensorSpec(shape, BF16) for name, shape in shapes.items()}
    with HFWriter(tmp_path, tensors, split_by_size(tensors, parse_size("5GB"))):
        pass
    plan = plan_import(tmp_path)
    assert plan.model.names() == list(shapes)
    assert sum(tensor.nbytes for tensor in plan.model.tensors.values()) == nbytes
