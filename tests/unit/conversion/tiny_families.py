"""Tiny models of every family, saved by transformers, and their Megatron tensors by formula."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

VOCABULARY, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 507, 64, 96, 4, 2, 32
LAYERS, EXPERTS, EXPERT_FFN = 3, 4, 40
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_EXPERTS = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": EXPERT_FFN,
    "norm_topk_prob": True,
}
# Class in transformers, and what differs from the common shape.
FAMILIES = {
    "qwen3": ("Qwen3", {"head_dim": HEAD_DIM}),
    "qwen3-tied": ("Qwen3", {"head_dim": HEAD_DIM, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": HEAD_DIM, **_EXPERTS}),
    "qwen3-moe-unnormalized": (
        "Qwen3Moe",
        {"head_dim": HEAD_DIM, **_EXPERTS, "norm_topk_prob": False},
    ),
    "qwen3-moe-mixed": ("Qwen3Moe", {"head_dim": HEAD_DIM, **_EXPERTS, "mlp_only_layers": [1]}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "llama": ("Llama", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-tied": (
        "Llama",
        {
            "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
            "tie_word_embeddings": True,
            "head_dim": HEAD_DIM,
        },
    ),
    "olmo2": ("Olmo2", {}),
    "olmo2-tied": ("Olmo2", {"tie_word_embeddings": True, "head_dim": HEAD_DIM}),
}


def make_family(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A random model; its norms and biases are random too, or a swap would go unseen."""
    kind, changes = FAMILIES[name]
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 16384,
        "rope_parameters": dict(_PLAIN_ROPE),
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    config = getattr(transformers, f"{kind}Config")(**{**shape, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            mean, std = (1.0, 0.3) if parameter.ndim == 1 else (0.0, 0.15)
            parameter.normal_(mean, std, generator=generator)
    model.to(dtype).save_pretrained(folder)
    return folder


def megatron_tensors(hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The Megatron tensors of a model of any family, by formula."""
    layers = [_layer(hf, f"model.layers.{layer}.") for layer in range(LAYERS)]
    if all(layer.keys() == layers[0].keys() for layer in layers):
        tensors = {
            f"decoder.layers.{key}": torch.stack([layer[key] for layer in layers])
            for key in layers[0]
        }
    else:
        tensors = {
            f"decoder.layers.{number}.{key}": tensor
            for number, layer in enumerate(layers)
            for key, tensor in layer.items()
        }
    tensors["embedding.word_embeddings.weight"] = hf["model.embed_tokens.weight"]
    tensors["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    if "lm_head.weight" in hf:
        tensors["output_layer.weight"] = hf["lm_head.weight"]
    return tensors


# By whether they are before attention and MLP, as everywhere but in OLMo-2.
_NORMS = {
    True: {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    },
    False: {
        "self_attention.q_norm.weight": "self_attn.q_norm.weight",
        "self_attention.k_norm.weight": "self_attn.k_norm.weight",
        "self_attention.post_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.post_layernorm.weight": "post_feedforward_layernorm.weight",
    },
}


def _layer(hf: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    own = {name.removeprefix(prefix): hf[name] for name in hf if name.startswith(prefix)}
    tensors = {"self_attention.linear_proj.weight": own["self_attn.o_proj.weight"]}
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in own:
            parts = [own[f"self_attn.{part}_proj.{kind}"] for part in "qkv"]
            by_group = [part.unflatten(0, (KV_HEADS, -1)) for part in parts]
            tensors[f"self_attention.linear_qkv.{kind}"] = torch.cat(by_group, dim=1).flatten(0, 1)
    for megatron, hf in _NORMS["input_layernorm.weight" in own].items():
        if hf in own:
            tensors[megatron] = own[hf]
    if "mlp.gate.weight" not in own:
        gate_up = [own[f"mlp.{part}_proj.weight"] for part in ("gate", "up")]
        tensors["mlp.linear_fc1.weight"] = torch.cat(gate_up)
        tensors["mlp.linear_fc2.weight"] = own["mlp.down_proj.weight"]
        return tensors
    experts = [
        [own[f"mlp.experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")]
        for e in range(EXPERTS)
    ]
    tensors["pre_mlp_layernorm.weight"] = own["post_attention_layernorm.weight"]
    tensors["mlp.router.weight"] = own["mlp.gate.weight"]
    tensors["mlp.experts.experts.linear_fc1.weight"] = torch.stack(
        [torch.cat([gate, up]) for gate, up, _ in experts]
    )
    tensors["mlp.experts.experts.linear_fc2.weight"] = torch.stack([d for _, _, d in experts])
    return tensors
