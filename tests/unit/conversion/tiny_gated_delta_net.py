"""Tiny models with Gated DeltaNet, of odd sizes, and their Megatron tensors by formula."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

VOCABULARY, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 507, 72, 100, 6, 2, 40
KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, KERNEL = 2, 6, 12, 20, 3
QK, V = KEY_HEADS * KEY_DIM, VALUE_HEADS * VALUE_DIM
EXPERTS, EXPERT_FFN, SHARED_FFN = 5, 36, 28
LINEAR = (True, True, False, True, False)
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": len(LINEAR),
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "linear_num_key_heads": KEY_HEADS,
    "linear_num_value_heads": VALUE_HEADS,
    "linear_key_head_dim": KEY_DIM,
    "linear_value_head_dim": VALUE_DIM,
    "linear_conv_kernel_dim": KERNEL,
    "layer_types": ["linear_attention" if linear else "full_attention" for linear in LINEAR],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 500000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 2, 1],
        "mrope_interleaved": True,
    },
}
_DENSE = {"intermediate_size": FFN}
_EXPERTS = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": EXPERT_FFN,
    "shared_expert_intermediate_size": SHARED_FFN,
}
_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
    "patch_size": 4,
}
# Class in transformers, configuration of the language model, and whether a vision tower comes with it.
_MODELS = {
    "qwen3.5": ("Qwen3_5", _DENSE, False),
    "qwen3.5-tied": ("Qwen3_5", {**_DENSE, "tie_word_embeddings": True}, False),
    "qwen3.5-vision": ("Qwen3_5", _DENSE, True),
    "qwen3.5-vision-tied": ("Qwen3_5", {**_DENSE, "tie_word_embeddings": True}, True),
    "qwen3.5-moe": ("Qwen3_5Moe", _EXPERTS, False),
    "qwen3.5-moe-vision": ("Qwen3_5Moe", _EXPERTS, True),
    "qwen3-next": ("Qwen3Next", {**_DENSE, **_EXPERTS, "norm_topk_prob": True}, False),
}
MODELS = (*_MODELS, "qwen3.5-moe-packed", "qwen3.5-moe-vision-packed", "qwen3-next-packed")


def make_model(
    folder: Path, name: str, dtype: torch.dtype = torch.float32, shard_size: str = "1GB"
) -> Path:
    """A random model as transformers saves it; norms are random too, or a swap would go unseen.

    A model with a vision tower gets MTP tensors too, which transformers would not write. "packed" in the name
    stores the experts as the published folders do.
    """
    is_packed = name.endswith("-packed")
    name = name.removesuffix("-packed")
    kind, own, with_vision = _MODELS[name]
    text = {**_TEXT, **own}
    if with_vision:
        tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
        config = getattr(transformers, f"{kind}Config")(
            text_config=text, vision_config=_VISION, **tied
        )
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    else:
        suffix = "Config" if kind == "Qwen3Next" else "TextConfig"
        model = getattr(transformers, f"{kind}ForCausalLM")(
            getattr(transformers, kind + suffix)(**text)
        )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            mean, std = (0.2, 0.3) if parameter.ndim == 1 else (0.0, 0.15)
            parameter.normal_(mean, std, generator=generator)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    if with_vision and shard_size == "1GB":
        file = folder / "model.safetensors"
        tensors = load_file(file) | mtp_tensors(dtype, generator)
        save_file(tensors, file, metadata={"format": "pt"})
    if is_packed:
        pack_experts(folder)
    return folder


def mtp_tensors(dtype: torch.dtype, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Some of the tensors that predict further tokens; one of a dtype that weights do not have."""
    return {
        "mtp.fc.weight": torch.randn(HIDDEN, 2 * HIDDEN, generator=generator).to(dtype),
        "mtp.norm.weight": torch.randn(HIDDEN, generator=generator).to(dtype),
        "mtp.layers.0.mlp.down_proj.weight": torch.randn(HIDDEN, FFN, generator=generator).double(),
    }


def pack_experts(folder: Path) -> None:
    """Store the experts of a layer in one tensor, as the published folders do; transformers writes each."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    experts: dict[str, dict[str, torch.Tensor]] = {}
    for name in [name for name in tensors if ".mlp.experts." in name]:
        layer, own = name.split(".mlp.experts.")
        experts.setdefault(layer, {})[own] = tensors.pop(name)
    for layer, own in experts.items():
        parts = {
            part: torch.stack(
                [own[f"{number}.{part}_proj.weight"] for number in range(len(own) // 3)]
            )
            for part in ("gate", "up", "down")
        }
        gate_up = torch.cat([parts["gate"], parts["up"]], dim=1)
        tensors[f"{layer}.mlp.experts.gate_up_proj"] = gate_up
        tensors[f"{layer}.mlp.experts.down_proj"] = parts["down"]
    save_file(tensors, file, metadata={"format": "pt"})


def megatron_tensors(hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The Megatron tensors of a model, by formula."""
    base = "model.language_model." if any("language_model" in name for name in hf) else "model."
    tensors = {
        f"decoder.layers.{layer}.{key}": value
        for layer, linear in enumerate(LINEAR)
        for key, value in _layer(hf, f"{base}layers.{layer}.", linear).items()
    }
    tensors["embedding.word_embeddings.weight"] = hf[f"{base}embed_tokens.weight"]
    tensors["decoder.final_layernorm.weight"] = hf[f"{base}norm.weight"]
    if "lm_head.weight" in hf:
        tensors["output_layer.weight"] = hf["lm_head.weight"]
    return tensors


def _layer(hf: dict[str, torch.Tensor], prefix: str, linear: bool) -> dict[str, torch.Tensor]:
    own = {name.removeprefix(prefix): hf[name] for name in hf if name.startswith(prefix)}
    mixer = _delta_net(own) if linear else _attention(own)
    return {**{f"self_attention.{key}": value for key, value in mixer.items()}, **_mlp(own)}


def _delta_net(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if "linear_attn.in_proj_qkv.weight" in own:
        parts = [*own["linear_attn.in_proj_qkv.weight"].split([QK, QK, V])]
        parts += [own[f"linear_attn.in_proj_{part}.weight"] for part in "zba"]
    else:  # Qwen3-Next: grouped by key heads
        values = V // KEY_HEADS
        qkvz = own["linear_attn.in_proj_qkvz.weight"].unflatten(0, (KEY_HEADS, -1))
        ba = own["linear_attn.in_proj_ba.weight"].unflatten(0, (KEY_HEADS, -1))
        grouped = [*qkvz.split([KEY_DIM, KEY_DIM, values, values], dim=1), *ba.chunk(2, dim=1)]
        parts = [part.flatten(0, 1) for part in grouped]
    names = ("query", "key", "value", "z", "beta", "alpha")
    convolution = own["linear_attn.conv1d.weight"].split([QK, QK, V])
    return {
        "in_proj.layer_norm_weight": own["input_layernorm.weight"],
        **{f"in_proj.weight.{name}": part for name, part in zip(names, parts, strict=True)},
        **{
            f"conv1d.weight.{name}": part for name, part in zip(names[:3], convolution, strict=True)
        },
        "A_log": own["linear_attn.A_log"],
        "dt_bias": own["linear_attn.dt_bias"],
        "out_norm.plain_weight": own["linear_attn.norm.weight"],
        "out_proj.weight": own["linear_attn.out_proj.weight"],
    }


def _attention(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    per_group = HEADS // KV_HEADS
    q = own["self_attn.q_proj.weight"].view(KV_HEADS, per_group, 2, HEAD_DIM, HIDDEN)
    query, gate = q.unbind(2)
    k, v = (
        own[f"self_attn.{part}_proj.weight"].view(KV_HEADS, 1, HEAD_DIM, HIDDEN) for part in "kv"
    )
    return {
        "linear_qkv.layer_norm_weight": own["input_layernorm.weight"],
        "linear_qkv.weight": torch.cat([query, gate, k, v], dim=1).reshape(-1, HIDDEN),
        "q_layernorm.weight": own["self_attn.q_norm.weight"],
        "k_layernorm.weight": own["self_attn.k_norm.weight"],
        "linear_proj.weight": own["self_attn.o_proj.weight"],
    }


def _mlp(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    def gate_up(prefix: str) -> torch.Tensor:
        return torch.cat([own[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up")])

    norm = {"mlp.linear_fc1.layer_norm_weight": own["post_attention_layernorm.weight"]}
    if "mlp.gate.weight" not in own:
        fc2 = own["mlp.down_proj.weight"]
        return {**norm, "mlp.linear_fc1.weight": gate_up("mlp"), "mlp.linear_fc2.weight": fc2}
    if "mlp.experts.gate_up_proj" in own:
        fc1, fc2 = own["mlp.experts.gate_up_proj"], own["mlp.experts.down_proj"]
    else:
        fc1 = torch.stack([gate_up(f"mlp.experts.{e}") for e in range(EXPERTS)])
        fc2 = torch.stack([own[f"mlp.experts.{e}.down_proj.weight"] for e in range(EXPERTS)])
    return {
        **norm,
        "pre_mlp_layernorm.weight": own["post_attention_layernorm.weight"],
        "mlp.router.weight": own["mlp.gate.weight"],
        "mlp.experts.experts.linear_fc1.weight": fc1,
        "mlp.experts.experts.linear_fc2.weight": fc2,
        "mlp.shared_experts.linear_fc1.weight": gate_up("mlp.shared_expert"),
        "mlp.shared_experts.linear_fc2.weight": own["mlp.shared_expert.down_proj.weight"],
        "mlp.shared_experts.gate_weight": own["mlp.shared_expert_gate.weight"],
    }
