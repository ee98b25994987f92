"""Tiny models with random weights, as HuggingFace folders and as Megatron checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from make_tiny_model import TinyShape, make_tiny_model
from safetensors.torch import load_file, save_file

from checkpoint_conversion.hf_to_megatron import hf_to_megatron

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples" / "data"


@dataclass(frozen=True)
class TinyModel:
    """A random model as a HuggingFace folder and as a Megatron checkpoint of the same weights."""

    hf: Path
    megatron: Path


_QWEN3_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.01,
}
_STATE = ["linear_attention"]
_QWEN3_5 = {
    # A pattern that repeats, cut off by the end of the model; the one with experts has none.
    "layer_types": [*_STATE * 2, "full_attention", *_STATE],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 14,
    "linear_conv_kernel_dim": 4,
    # With 1e-6 the norm of a state's outputs divides by so little that fp32 is off by 5e-5, here and there.
    "rms_norm_eps": 1e-2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.25,
    },
}
# Class in transformers, and what its config has beside the sizes of the tiny Qwen3.
FAMILIES = {
    "qwen3-moe": ("Qwen3Moe", _QWEN3_MOE),
    "qwen3-moe-mixed": ("Qwen3Moe", {**_QWEN3_MOE, "mlp_only_layers": [2]}),
    "qwen3.5": ("Qwen3_5", _QWEN3_5),
    "qwen3.5-moe": (
        "Qwen3_5Moe",
        {
            **_QWEN3_5,
            "layer_types": [*_STATE, "full_attention", *_STATE * 2],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 48,
            "router_aux_loss_coef": 0.01,
        },
    ),
    "qwen2": ("Qwen2", {"head_dim": None}),
    "llama": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
    ),
    # Heads and KV heads for two and for three tensor-parallel ranks; three KV heads on each of two.
    "olmo2": (
        "Olmo2",
        {
            "head_dim": None,
            "hidden_size": 96,
            "num_attention_heads": 12,
            "num_key_value_heads": 6,
        },
    ),
}


def make_family(folder: Path, name: str) -> TinyModel:
    """A model of another family, with the sizes and the tokenizer of the tiny Qwen3."""
    model = make_model(folder, tied=False)
    kind, changes = FAMILIES[name]
    sizes = json.loads((model.hf / "config.json").read_text())
    for key in ("architectures", "model_type", "layer_types", "max_window_layers"):
        del sizes[key]
    settings = {key: value for key, value in {**sizes, **changes}.items() if value is not None}
    architecture = getattr(transformers, f"{kind}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        architecture(architecture.config_class(**settings)).save_pretrained(model.hf)
    _spread(model.hf)
    hf_to_megatron(model.hf, model.megatron, overwrite=True)
    return model


def make_model(folder: Path, *, tied: bool) -> TinyModel:
    # 508 rows: a multiple of 4 that is not one of 8, and more rows than the tokenizer has tokens.
    shape = TinyShape(
        vocab_size=508,
        hidden_size=64,
        intermediate_size=96,
        num_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tied=tied,
    )
    hf = make_tiny_model(folder / "hf", sorted(EXAMPLES.glob("*.jsonl")), shape, seed=7)
    _spread(hf)
    hf_to_megatron(hf, folder / "megatron")
    return TinyModel(hf, folder / "megatron")


def _spread(hf: Path) -> None:
    """Change the weights: norms of ones, biases of zeros and tiny logits would hide mistakes."""
    weights = load_file(hf / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for weight in weights.values():
        if weight.ndim == 1:
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
        else:
            weight *= 3.0
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
