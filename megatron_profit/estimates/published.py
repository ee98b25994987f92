"""Configurations of published models, with the keys that matter: for estimates without a download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_profit.estimates.run_shape import ShapeError


@dataclass(frozen=True)
class Sizes:
    """Sizes of a published model.

    Attributes:
        hidden, mlp, layers, heads, kv_heads: As in config.json.
        tied: Whether embedding and output layer are one tensor.
        expert_mlp: Size of an expert, None for a dense model.
        head_dim: Size of a head.
        vocab: Vocabulary entries.
        positions: Positions of the longest row.
        experts, top_k: Experts of a layer, and of a token.
        value_heads: Heads of the values in Gated DeltaNet layers.
    """

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    expert_mlp: int | None = None
    head_dim: int = 128
    vocab: int = 151936
    positions: int = 32768
    experts: int = 128
    top_k: int = 8
    value_heads: int | None = None


_QWEN3 = {
    "Qwen3-0.6B": Sizes(1024, 3072, 28, 16, 8, True),
    "Qwen3-1.7B": Sizes(2048, 6144, 28, 16, 8, True),
    "Qwen3-4B": Sizes(2560, 9728, 36, 32, 8, True),
    "Qwen3-8B": Sizes(4096, 12288, 36, 32, 8, False),
    "Qwen3-14B": Sizes(5120, 17408, 40, 40, 8, False),
    "Qwen3-32B": Sizes(5120, 25600, 64, 64, 8, False),
    "Qwen3-30B-A3B": Sizes(2048, 6144, 48, 32, 4, False, 768),
    "Qwen3-235B-A22B": Sizes(4096, 12288, 94, 64, 4, False, 1536),
}
_QWEN2 = {
    "Qwen2.5-0.5B": Sizes(896, 4864, 24, 14, 2, True, head_dim=64),
    "Qwen2.5-1.5B": Sizes(1536, 8960, 28, 12, 2, True),
    "Qwen2.5-3B": Sizes(2048, 11008, 36, 16, 2, True),
    "Qwen2.5-7B": Sizes(3584, 18944, 28, 28, 4, False, vocab=152064, positions=131072),
    "Qwen2.5-14B": Sizes(5120, 13824, 48, 40, 8, False, vocab=152064, positions=131072),
    "Qwen2.5-32B": Sizes(5120, 27648, 64, 40, 8, False, vocab=152064, positions=131072),
    "Qwen2.5-72B": Sizes(8192, 29568, 80, 64, 8, False, vocab=152064, positions=131072),
}
_LLAMA3 = {
    "Llama-3.2-1B": Sizes(2048, 8192, 16, 32, 8, True, None, 64, 128256, 131072),
    "Llama-3.2-3B": Sizes(3072, 8192, 28, 24, 8, True, None, 128, 128256, 131072),
    "Llama-3.1-8B": Sizes(4096, 14336, 32, 32, 8, False, None, 128, 128256, 131072),
    "Llama-3.1-70B": Sizes(8192, 28672, 80, 64, 8, False, None, 128, 128256, 131072),
}
_OLMO2 = {
    "OLMo-2-0425-1B": Sizes(2048, 8192, 16, 16, 16, False, vocab=100352, positions=4096),
    "OLMo-2-1124-7B": Sizes(4096, 11008, 32, 32, 32, False, vocab=100352, positions=4096),
    "OLMo-2-1124-13B": Sizes(5120, 13824, 40, 40, 40, False, vocab=100352, positions=4096),
    "OLMo-2-0325-32B": Sizes(5120, 27648, 64, 40, 8, False, vocab=100352, positions=4096),
}
_LONG: dict[str, Any] = {"head_dim": 256, "vocab": 248320, "positions": 262144}
_QWEN35 = {
    "Qwen3.5-0.8B": Sizes(1024, 3584, 24, 8, 2, True, **_LONG, value_heads=16),
    "Qwen3.5-2B": Sizes(2048, 6144, 24, 8, 2, True, **_LONG, value_heads=16),
    "Qwen3.5-4B": Sizes(2560, 9216, 32, 16, 4, True, **_LONG, value_heads=32),
    "Qwen3.5-9B": Sizes(4096, 12288, 32, 16, 4, False, **_LONG, value_heads=32),
    "Qwen3.5-27B": Sizes(5120, 17408, 64, 24, 4, False, **_LONG, value_heads=48),
    "Qwen3.5-35B-A3B": Sizes(
        2048, 512, 40, 16, 2, False, 512, **_LONG, experts=256, value_heads=32
    ),
    "Qwen3.5-122B-A10B": Sizes(
        *(3072, 1024, 48, 32, 2, False, 1024), **_LONG, experts=256, value_heads=64
    ),
    "Qwen3.5-397B-A17B": Sizes(
        *(4096, 1024, 60, 32, 2, False, 1024), **_LONG, experts=512, top_k=10, value_heads=64
    ),
}
PUBLISHED = {**_QWEN3, **_QWEN35, **_QWEN2, **_LLAMA3, **_OLMO2}


def published_config(name: str) -> dict[str, Any]:
    """Return the config.json of a published model, with the keys that matter.

    Raises:
        ShapeError: The name is unknown.
    """
    if name not in PUBLISHED:
        raise ShapeError(f"--model {name} is unknown; it can be {', '.join(PUBLISHED)}")
    sizes = PUBLISHED[name]
    config = {
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.mlp,
        "max_position_embeddings": sizes.positions,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "tie_word_embeddings": sizes.tied,
        "vocab_size": sizes.vocab,
    }
    if name in _LLAMA3:
        return config | _of_llama3(sizes)
    if name in _QWEN35:
        return config | _of_qwen35(sizes)
    if name in _QWEN2:
        return config | _kind("Qwen2ForCausalLM", "qwen2") | {"use_sliding_window": False}
    if name in _OLMO2:
        own = {"attention_bias": False, "rope_theta": 500000}
        return config | _kind("Olmo2ForCausalLM", "olmo2") | own
    more = {"attention_bias": False, "head_dim": sizes.head_dim, "use_sliding_window": False}
    if sizes.expert_mlp is None:
        return config | _kind("Qwen3ForCausalLM", "qwen3") | more
    return config | _kind("Qwen3MoeForCausalLM", "qwen3_moe") | more | _experts(sizes)


def _kind(architecture: str, model_type: str) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type}


def _experts(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "moe_intermediate_size": sizes.expert_mlp,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
    }


def _of_qwen35(sizes: Sizes) -> dict[str, Any]:
    """Return the keys of the language model alone."""
    own = {
        "head_dim": sizes.head_dim,
        "linear_num_value_heads": sizes.value_heads,
        "rope_theta": 10000000,
    }
    if sizes.expert_mlp is None:
        return _kind("Qwen3_5ForCausalLM", "qwen3_5_text") | own
    shared = {"shared_expert_intermediate_size": sizes.expert_mlp}
    kind = _kind("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text")
    return kind | own | _experts(sizes) | shared


def _of_llama3(sizes: Sizes) -> dict[str, Any]:
    return _kind("LlamaForCausalLM", "llama") | {
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": sizes.head_dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0 if sizes.tied else 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    }
