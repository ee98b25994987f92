"""Qwen3.5 to 3.8 and Qwen3-Next in every published size: names and shapes are those of transformers, the
bytes and the number of tensors those of the published index files, flags those of the config.

Sizes are from the models' config.json. `total_size` and the number of tensors are from their
`model.safetensors.index.json` on huggingface.co/Qwen: Qwen3.5-0.8B-Base, -2B, -4B, -9B, -27B, Qwen3.8-27B and
Qwen3.6-35B-A3B. The others' index was not at hand, so their parameters are compared with their names. The
3.5 ones store A_log and the plain norm in fp32, the later ones everything in bf16.
"""

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

# hidden size, layers, attention heads, key/value heads, value heads of the linear layers
DENSE = {
    "0.8B": (1024, 24, 8, 2, 16),
    "2B": (2048, 24, 8, 2, 16),
    "4B": (2560, 32, 16, 4, 32),
    "9B": (4096, 32, 16, 4, 32),
    "27B": (5120, 64, 24, 4, 48),
}
MOE = {
    "35B-A3B": (2048, 40, 16, 2, 32),
    "122B-A10B": (3072, 48, 32, 2, 64),
    "397B-A17B": (4096, 60, 32, 2, 64),
}
MLP = {"0.8B": 3584, "2B": 6144, "4B": 9216, "9B": 12288, "27B": 17408}
# experts, experts of a token, inner size of an expert and of the shared one
EXPERTS = {"35B-A3B": (256, 8, 512), "122B-A10B": (256, 8, 1024), "397B-A17B": (512, 10, 1024)}
# hidden size, layers and inner size of the vision tower
VISION = {"0.8B": (768, 12, 3072), "2B": (1024, 24, 4096), "4B": (1024, 24, 4096)}
LARGE_VISION = (1152, 27, 4304)
TIED = ("0.8B", "2B", "4B")
# The index: tensors of the language model, of the vision tower and of MTP, and all bytes.
INDEX = {
    ("0.8B", True): (320, 153, 15, 1746882752),
    ("2B", True): (320, 297, 15, 4548144832),
    ("4B", True): (426, 297, 15, 9319737856),
    ("9B", True): (427, 333, 15, 19306216416),
    ("27B", True): (851, 333, 15, 55562872800),
    ("27B", False): (851, 333, 15, 55562855904),
    ("35B-A3B", False): (693, 333, 19, 71903645408),
}
SIZES = [*DENSE, *MOE]


def published(size: str) -> dict:
    """config.json as published."""
    hidden, layers, heads, kv_heads, value_heads = {**DENSE, **MOE}[size]
    is_moe = size in MOE
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "layer_types": ([*["linear_attention"] * 3, "full_attention"] * layers)[:layers],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_moe_text" if is_moe else "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "use_cache": True,
        "vocab_size": 248320,
        "mamba_ssm_dtype": "float32",
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
        },
        **_mlp(size),
    }
    vision_hidden, depth, vision_mlp = VISION.get(size, LARGE_VISION)
    kind = "qwen3_5_moe" if is_moe else "qwen3_5"
    name = "Qwen3_5Moe" if is_moe else "Qwen3_5"
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "image_token_id": 248056,
        "model_type": kind,
        "text_config": text,
        "tie_word_embeddings": size in TIED,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 248057,
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": vision_hidden,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": vision_mlp,
            "model_type": kind,
            "num_heads": 12 if size == "0.8B" else 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 248054,
        "vision_start_token_id": 248053,
    }


def _mlp(size: str) -> dict:
    if size in MLP:
        return {"intermediate_size": MLP[size]}
    experts, top_k, inner = EXPERTS[size]
    return {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": inner,
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
    }


NEXT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}


def _of_transformers(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model that transformers builds."""
    kind = config["architectures"][0]
    name = kind.removesuffix("ForConditionalGeneration").removesuffix("ForCausalLM")
    with torch.device("meta"):
        read = getattr(transformers, f"{name}Config").from_dict(config)
        model = getattr(transformers, kind)(read)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _numel(shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_those_of_transformers(size):
    config = published(size)
    found = expected_shapes(family_for(config).tensor_rules(config))
    whole = _of_transformers(config)
    text = {name: shape for name, shape in whole.items() if not name.startswith("model.visual.")}
    assert found == text
    billions = float(size.split("B")[0])
    assert _numel(found.values()) / 1e9 == pytest.approx(billions, rel=0.06)


@pytest.mark.parametrize(("size", "is_mixed"), INDEX)
def test_tensors_and_bytes_are_those_of_the_published_index(size, is_mixed):
    """With the vision tower of transformers, and an MTP of one attention layer."""
    text_tensors, vision_tensors, mtp_tensors, total = INDEX[size, is_mixed]
    config = published(size)
    text = expected_shapes(family_for(config).tensor_rules(config))
    vision = {n: s for n, s in _of_transformers(config).items() if n.startswith("model.visual.")}
    last = f"model.language_model.layers.{config['text_config']['num_hidden_layers'] - 1}."
    hidden = config["text_config"]["hidden_size"]
    mtp = [shape for name, shape in text.items() if name.startswith(last)]
    mtp += [(hidden, 2 * hidden), (hidden,), (hidden,), (hidden,)]
    assert (len(text), len(vision), len(mtp)) == (text_tensors, vision_tensors, mtp_tensors)
    fp32 = {n: s for n, s in text.items() if n.endswith(("A_log", "linear_attn.norm.weight"))}
    nbytes = 2 * _numel([*text.values(), *vision.values(), *mtp])
    assert nbytes + is_mixed * 2 * _numel(fp32.values()) == total


@pytest.mark.parametrize(
    "layout", ["as published", "as transformers writes it", "language model alone"]
)
@pytest.mark.parametrize("size", SIZES)
def test_flags_are_those_of_the_config(size, layout):
    hidden, layers, heads, kv_heads, value_heads = {**DENSE, **MOE}[size]
    config = published(size)
    kind = config["architectures"][0].removesuffix("ForConditionalGeneration")
    read = getattr(transformers, f"{kind}Config").from_dict(config)
    if layout == "as transformers writes it":
        config = read.to_diff_dict() | {"architectures": config["architectures"]}
    elif layout == "language model alone":
        tied = {"tie_word_embeddings": size in TIED}
        config = read.text_config.to_dict() | {"architectures": [f"{kind}ForCausalLM"]} | tied
    arguments = family_for(config).megatron_arguments(config)
    expected = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": kv_heads,
        "kv_channels": 256,
        "rotary_base": 10000000,
        "rotary_percent": 0.25,
        "layernorm_epsilon": 1e-06,
        "layernorm_zero_centered_gamma": True,
        "attention_output_gate": True,
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "untie_embeddings_and_output_weights": size not in TIED,
        "qk_layernorm": True,
        "add_qkv_bias": False,
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
    }
    if size in MLP:
        expected["ffn_hidden_size"] = MLP[size]
        assert "num_experts" not in arguments
    else:
        experts, top_k, inner = EXPERTS[size]
        expected |= {
            "num_experts": experts,
            "moe_router_topk": top_k,
            "moe_ffn_hidden_size": inner,
            "moe_layer_freq": 1,
            "moe_router_pre_softmax": False,
            "moe_router_score_function": "softmax",
            "moe_shared_expert_intermediate_size": inner,
            "moe_shared_expert_gate": True,
            "moe_aux_loss_coeff": 0.001,
        }
    assert {name: arguments[name] for name in expected} == expected


def test_qwen3_next_is_the_model_of_transformers():
    family = family_for(NEXT)
    one_by_one, packed = (
        expected_shapes(table(NEXT)) for table in (family.tensor_rules, *family.other_forms)
    )
    assert packed == _of_transformers(NEXT)
    assert _numel(one_by_one.values()) == _numel(packed.values()) == pytest.approx(80e9, rel=0.01)
    assert one_by_one["model.layers.47.mlp.experts.511.down_proj.weight"] == (2048, 512)
    arguments = family.megatron_arguments(NEXT)
    assert (arguments["rotary_percent"], arguments["rotary_base"]) == (0.25, 10000000)
    assert (arguments["moe_router_topk"], arguments["linear_attention_freq"]) == (10, 4)


def test_dry_run_of_full_size_headers(tmp_path):
    """Files of the published size whose data are holes."""
    config = published("35B-A3B")
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = _of_transformers(config)
    tensors = {name: TensorSpec(shape, BF16) for name, shape in shapes.items()}
    with HFWriter(tmp_path, tensors, split_by_size(tensors, parse_size("5GB"))):
        pass
    plan = plan_import(tmp_path)
    assert len(plan.model.names()) == 693
    assert len(plan.model.carried) == 333
    assert plan.nbytes == 69321221376 + 40 * 2048 * 2  # the norm before the experts has two names
