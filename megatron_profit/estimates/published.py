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
PUBLISHED = {**_QWEN3, **_QWEN2, **_LLAMA3, **_OLMO2}


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
    if name in _QWEN2:
        return config | _kind("Qwen2ForCausalLM", "qwen2") | {"use_sliding_window": False}
    if name in _OLMO2:
        own = {"attention_bias": False, "rope_theta": 500000}
        return config | _kind("Olmo2ForCausalLM", "olmo2") | own
    more = {"attention_bias": False, "head_dim": sizes.head_dim, "use_sliding_window": False}
    if sizes.expert_mlp is None:
        return config | _kind("Qwen3ForCausalLM", "qwen3") | more
    return config | _kind("Qwen3MoeForCausalLM", "qwen3_moe") | more | _experts(sizes.expert_mlp)


def _kind(architecture: str, model_type: str) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type}


def _experts(mlp: int) -> dict[str, Any]:
    return {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": mlp,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
    }


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
