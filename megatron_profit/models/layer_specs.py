"""Layer specs: Megatron's own, with the parts replaced that cannot do SFT without Transformer Engine.

With Transformer Engine the spec is Megatron's, untouched. Its local implementation lacks two things: an
RMSNorm that works under sequence parallelism, and an attention whose memory does not grow with the
square of the sequence length. Both are supplied here.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that works under sequence parallelism.

    torch.nn.RMSNorm computes in fp32 whatever the input dtype. Under sequence parallelism each rank
    sees a part of the sequence; marking the weight makes Megatron sum its gradient over the
    tensor-parallel group (megatron/core/distributed/finalize_model_grads.py).
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class ScaledDotProductAttention(MegatronModule):
    """Causal core attention on torch's scaled_dot_product_attention.

    The interface is that of megatron.core.transformer.dot_product_attention.DotProductAttention.

    Raises:
        ValueError: For what Transformer Engine is needed for: context parallelism, attention that is
            not causal self-attention, a learnable softmax offset, an attention window.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        unsupported = {
            "context_parallel_size": config.context_parallel_size > 1,
            "attn_mask_type": attn_mask_type is not AttnMaskType.causal,
            "softmax_type": config.softmax_type != "vanilla",
            "window_size": config.window_size is not None,
            "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
        }
        for name, is_unsupported in unsupported.items():
            if is_unsupported:
                value = attn_mask_type if name == "attn_mask_type" else getattr(config, name)
                raise ValueError(
                    f"{name}={value} needs Transformer Engine; install it or drop the option"
                )
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [S, B, heads, head_dim]; key and value: [S, B, KV heads, head_dim].
            attention_mask: Broadcastable to [B, heads, S, S], True where attention is forbidden;
                None means causal.

        Returns:
            Context [S, B, heads * head_dim].
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("attention bias and packed (thd) sequences need Transformer Engine")
        dropout = self.dropout if self.training else 0.0
        with get_cuda_rng_tracker().fork() if dropout > 0.0 else nullcontext():
            context = torch.nn.functional.scaled_dot_product_attention(
                *(t.permute(1, 2, 0, 3) for t in (query, key, value)),
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=dropout,
                is_causal=attention_mask is None,
                scale=self.softmax_scale,
                enable_gqa=query.size(2) != key.size(2),
            )
        return context.permute(2, 0, 1, 3).flatten(2)


def layer_spec(
    config: GPTModelConfig, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The `GPTModelConfig.transformer_layer_spec` of this project.

    Args:
        config: The model configuration; `transformer_impl` decides between Transformer Engine, whose
            spec is Megatron's default, and the local implementation.
        vp_stage: Virtual pipeline stage to build, None without a virtual pipeline.
    """
    if config.transformer.transformer_impl != "local":
        return default_layer_spec(config, vp_stage)
    return _local_block_spec(config.transformer, vp_stage)


def _local_block_spec(
    config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=False,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    if config.normalization != "RMSNorm":
        return block
    return dataclasses.replace(
        block,
        layer_specs=[_with_own_parts(s, config) for s in block.layer_specs],
        layer_norm=RMSNorm,
    )


def _with_own_parts(spec: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    layer, attention = spec.submodules, spec.submodules.self_attention
    parts = {"core_attention": ScaledDotProductAttention}
    if config.qk_layernorm:
        parts |= {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm}
    attention = dataclasses.replace(
        attention, submodules=dataclasses.replace(attention.submodules, **parts)
    )
    layer = dataclasses.replace(
        layer, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm, self_attention=attention
    )
    return dataclasses.replace(spec, submodules=layer)
