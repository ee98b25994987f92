"""Layer specs: Megatron's own, except for the parts that cannot do SFT without Transformer Engine.

With either implementation, attention keeps the records of a row apart. Megatron's local implementation also
lacks two parts: an RMSNorm that works under sequence parallelism, and an attention for long rows. That
attention's memory must not grow with the square of the sequence length, and it must know context parallelism.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec
from torch.nn import functional as F

from megatron_profit.models.attention import (
    PackedSelfAttention,
    ScaledDotProductAttention,
    with_variable_lengths,
)
from megatron_profit.models.gated_delta_net.specs import (
    VARIANTS,
    has_delta_net,
    with_local_delta_nets,
    with_packed_delta_net,
)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that works under sequence parallelism.

    torch.nn.RMSNorm computes in fp32 whatever the input dtype. Under sequence parallelism each rank
    sees a part of the sequence; marking the weight makes Megatron sum its gradient over the
    tensor-parallel group (megatron/core/distributed/finalize_model_grads.py).

    Where the model's norms are zero-centred, the factor is 1 + weight, also in fp32.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.zero_centered = config.layernorm_zero_centered_gamma
        if self.zero_centered:
            torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of [..., hidden_size]."""
        if not self.zero_centered:
            return super().forward(x)
        factor = 1.0 + self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, factor, self.eps).type_as(x)


def layer_spec(
    config: GPTModelConfig, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return the `GPTModelConfig.transformer_layer_spec` of this project.

    Args:
        config: The model configuration; `transformer_impl` decides between Transformer Engine, whose
            spec is Megatron's default, and the local implementation.
        vp_stage: Virtual pipeline stage to build, None without a virtual pipeline.
    """
    if config.transformer.transformer_impl != "local":
        spec = default_layer_spec(config, vp_stage)
        if not isinstance(spec, TransformerBlockSubmodules):
            return _with_engine_attention(spec)
        layers = [_with_engine_attention(layer) for layer in spec.layer_specs]
        return dataclasses.replace(spec, layer_specs=layers)
    return _local_block_spec(config.transformer, vp_stage)


def _local_block_spec(
    config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    # Megatron's own spec for the variants of attention is Transformer Engine's alone.
    attention_alone = copy.copy(config)
    attention_alone.experimental_attention_variant = None
    block = get_gpt_decoder_block_spec(
        attention_alone,
        use_transformer_engine=False,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    if config.normalization != "RMSNorm":
        return block
    layers = [_with_own_parts(s, config) for s in block.layer_specs]
    if config.experimental_attention_variant in VARIANTS:
        layers = with_local_delta_nets(layers, config, vp_stage)
    return dataclasses.replace(block, layer_specs=layers, layer_norm=RMSNorm)


def _with_own_parts(spec: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    parts: dict[str, type] = {"core_attention": ScaledDotProductAttention}
    if config.qk_layernorm:
        parts |= {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm}
    spec = _with_attention_parts(spec, parts)
    layer = dataclasses.replace(spec.submodules, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm)
    return dataclasses.replace(spec, submodules=layer)


def _with_engine_attention(spec: ModuleSpec) -> ModuleSpec:
    """Return Transformer Engine's layer with an attention that keeps the records of a row apart."""
    if has_delta_net(spec):
        return with_packed_delta_net(spec)
    core_attention = spec.submodules.self_attention.submodules.core_attention
    return _with_attention_parts(spec, {"core_attention": with_variable_lengths(core_attention)})


def _with_attention_parts(spec: ModuleSpec, parts: dict[str, type]) -> ModuleSpec:
    attention = spec.submodules.self_attention
    attention = dataclasses.replace(
        attention,
        module=PackedSelfAttention,
        submodules=dataclasses.replace(attention.submodules, **parts),
    )
    layer = dataclasses.replace(spec.submodules, self_attention=attention)
    return dataclasses.replace(spec, submodules=layer)
