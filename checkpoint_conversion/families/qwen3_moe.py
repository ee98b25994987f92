"""Qwen3-MoE (Qwen3MoeForCausalLM): Qwen3's attention; experts in all or in some of the layers.

The names are the ones in the published checkpoints. `save_pretrained` of transformers 5 writes them
too, although it holds a layer's experts in two tensors in memory
(transformers/models/qwen3_moe/modeling_qwen3_moe.py). A program that saves the model's state dict by
itself writes these two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from checkpoint_conversion.families.config import ConfigReader
from checkpoint_conversion.families.decoder import (
    Decoder,
    Part,
    attention,
    decoder_arguments,
    dense_mlp,
    model_rules,
    one_by_one,
    packed_experts,
    qk_norms,
    read_decoder,
    router,
    separate_experts,
    stacked,
)
from checkpoint_conversion.families.family import Config, Family, TensorRule

# In all layers together. The largest models have about a tenth of it; each expert has three tensors.
_MOST_EXPERTS = 250_000


@dataclass(frozen=True)
class Experts:
    """The experts of a model.

    Attributes:
        count: Experts of a layer.
        top_k: Experts of a token.
        ffn: Inner size of an expert.
        layers: Whether each layer has experts or a dense MLP.
        normalized: Whether the weights of a token's experts sum to 1.
        aux_loss: Coefficient of the load-balancing loss.
    """

    count: int
    top_k: int
    ffn: int
    layers: tuple[bool, ...]
    normalized: bool
    aux_loss: float


def _reader(config: Config) -> ConfigReader:
    # Without a head_dim, the hidden size is shared out among the heads, other than in Qwen3.
    defaults = {"rms_norm_eps": 1e-6, "decoder_sparse_step": 1, "router_aux_loss_coef": 0.001}
    return ConfigReader(config, "Qwen3-MoE", {"attention_bias": False}, defaults)


def read_experts(read: ConfigReader) -> Experts:
    """Read the experts in a config.json.

    Raises:
        ConversionError: Names the key, its value and the supported values.
    """
    layers, step = read.size("num_hidden_layers"), read.size("decoder_sparse_step")
    dense = read.value("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < layers for i in dense):
        raise read.refused("mlp_only_layers", dense, f"a list of layers from 0 to {layers - 1}")
    without = frozenset(dense)
    sparse = tuple(i not in without and (i + 1) % step == 0 for i in range(layers))
    if not any(sparse):
        raise read.refused("mlp_only_layers", dense, "at least one layer with experts")
    count, top_k = read.size("num_experts", "num_local_experts"), read.size("num_experts_per_tok")
    if layers * count > _MOST_EXPERTS:
        raise read.refused("num_experts", count, f"at most {_MOST_EXPERTS} in all {layers} layers")
    if top_k > count:
        raise read.refused("num_experts_per_tok", top_k, f"at most the {count} experts there are")
    normalized = read.flag("norm_topk_prob")
    if top_k == 1 and normalized:
        raise read.refused("norm_topk_prob", True, "false with num_experts_per_tok=1")
    return Experts(
        count=count,
        top_k=top_k,
        ffn=read.size("moe_intermediate_size"),
        layers=sparse,
        normalized=normalized,
        aux_loss=read.number("router_aux_loss_coef", at_least=0.0),
    )


def megatron_arguments(config: Config) -> dict[str, Any]:
    """Return the Megatron arguments of a configuration; see `Family`.

    The run chooses between sequential and grouped experts (`moe_grouped_gemm`).
    """
    read = _reader(config)
    return {
        **decoder_arguments(read_decoder(read)),
        "qk_layernorm": True,
        **expert_arguments(read_experts(read)),
    }


def expert_arguments(experts: Experts) -> dict[str, Any]:
    """Return the Megatron arguments of experts.

    A softmax over all experts whose top k are normalised is a softmax over the top k. Megatron computes
    the latter without `--moe-router-pre-softmax`.
    """
    return {
        "num_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_layer_freq": 1 if all(experts.layers) else [int(sparse) for sparse in experts.layers],
        "moe_router_topk": experts.top_k,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": experts.aux_loss,
        "moe_router_dtype": "fp32",
    }


def tensor_rules(
    config: Config, experts_of: Callable[[Decoder, int, int], list[Part]] = separate_experts
) -> tuple[TensorRule, ...]:
    """Return the name table of a configuration; see `Family`.

    `experts_of` gives the names of the experts.

    If only some layers have experts, the layers are not alike, and each layer has its own tensors.
    """
    read = _reader(config)
    model, experts = read_decoder(read), read_experts(read)
    shared = [*attention(model), *qk_norms(model)]
    count, ffn = experts.count, experts.ffn
    sparse = [*shared, *router(model, count), *experts_of(model, count, ffn)]
    if all(experts.layers):
        return model_rules(model, stacked(model, sparse))
    dense = [*shared, *dense_mlp(model)]
    layers = [sparse if is_sparse else dense for is_sparse in experts.layers]
    return model_rules(model, one_by_one(model, layers))


QWEN3_MOE = Family(
    ("Qwen3MoeForCausalLM",),
    "qwen3_moe",
    megatron_arguments,
    tensor_rules,
    other_forms=(partial(tensor_rules, experts_of=packed_experts),),
)
