"""OLMo-2's layer: norms after attention and MLP, one norm of all queries and one of all keys of a token.

Megatron-Core's layer has its norms before attention and MLP, and its norms of queries and keys see one head
at a time. The parts here take their places in the layer spec, with Transformer Engine and without it.
A checkpoint has the same keys with both.

Shapes: queries or keys [S, B, heads, head_dim], of the heads on this rank.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from megatron.training.models.gpt import GPTModelConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_profit.models import layer_specs
from megatron_profit.models.attention import PackedSelfAttention


class ProjectionNorm(MegatronModule):
    """RMSNorm over all heads of the queries, or of the keys.

    Each tensor-parallel rank holds some heads, and their part of the weight. The mean is over all heads.
    Megatron's names for norms of single heads (`q_layernorm`) are avoided: it sums their gradients over the
    ranks (megatron/core/distributed/finalize_model_grads.py), which would be wrong for parts of a weight.

    Args:
        config: The configuration.
        heads: Heads on this rank.
        group: The tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, heads: int, group: ProcessGroup) -> None:
        super().__init__(config)
        self.group = group
        assert config.kv_channels is not None
        size = heads * config.kv_channels
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x`, with its shape and dtype."""
        heads, epsilon = x.flatten(-2), self.config.layernorm_epsilon
        if self.group.size() == 1:
            return F.rms_norm(heads, self.weight.shape, self.weight, epsilon).view(x.shape)
        return _SplitRMSNorm.apply(heads, self.weight, epsilon, self.group).view(x.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Return the weight's place in a checkpoint: the ranks' parts one after another."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class _SplitRMSNorm(torch.autograd.Function):
    """RMSNorm of vectors that are split over ranks along their last axis.

    With N entries over all ranks, r = (sum(x^2) / N + epsilon)^-1/2 and n = r x, the output is weight * n.
    The gradient of x is r (g - n sum(g n) / N), with g the output's gradient times the weight. Both sums are
    over all ranks, in fp32. Only `x` in its own dtype and r are kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, group: ProcessGroup) -> Tensor:
        squares = x.float().square().sum(-1, keepdim=True)
        torch.distributed.all_reduce(squares, group=group)
        rate = (squares / (x.size(-1) * group.size()) + epsilon).rsqrt()
        ctx.save_for_backward(x, weight, rate)
        ctx.group = group
        return (x.float() * rate * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, rate = ctx.saved_tensors
        gradient, normed = gradients[0].float(), x.float() * rate
        weighted = gradient * weight.float()
        products = (weighted * normed).sum(-1, keepdim=True)
        torch.distributed.all_reduce(products, group=ctx.group)
        mean = products / (x.size(-1) * ctx.group.size())
        of_weight = (gradient * normed).flatten(0, -2).sum(0)
        of_x = rate * (weighted - normed * mean)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None, None


class NormedSelfAttention(PackedSelfAttention):
    """Self-attention with norms of all queries and of all keys before the rotation, and of its output."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        group = self.pg_collection.tp
        self.q_norm = ProjectionNorm(self.config, self.num_attention_heads_per_partition, group)
        self.k_norm = ProjectionNorm(self.config, self.num_query_groups_per_partition, group)
        self.post_layernorm = _output_norm(self.config)

    def get_query_key_value_tensors(
        self, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, as Megatron's method does."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return self.q_norm(query), self.k_norm(key), value

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        output, bias = super().forward(*args, **kwargs)
        assert bias is None, "the projections of OLMo-2 have no bias"
        return self.post_layernorm(output), None


class NormedMLP(MLP):
    """A gated MLP with a norm of its output."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.post_layernorm = _output_norm(self.config)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return output and bias, as Megatron's MLP does."""
        output, bias = super().forward(*args, **kwargs)
        assert bias is None, "the projections of OLMo-2 have no bias"
        return self.post_layernorm(output), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Return the parameters' places in a checkpoint; the norm is a copy on each tensor-parallel rank.

        Megatron's MLP leaves out the group, so that each rank would claim to be the one that saves the norm.
        """
        place = (f"{prefix}post_layernorm.", sharded_offsets, metadata)
        norm = sharded_state_dict_default(self.post_layernorm, *place, tp_group=self.tp_group)
        return super().sharded_state_dict(prefix, sharded_offsets, metadata) | norm


def _is_local(config: TransformerConfig) -> bool:
    return config.transformer_impl == "local"


def _output_norm(config: TransformerConfig) -> torch.nn.Module:
    norm = layer_specs.RMSNorm if _is_local(config) else TENorm
    return norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def layer_spec(
    config: GPTModelConfig, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return the `GPTModelConfig.transformer_layer_spec` of OLMo-2.

    Args:
        config: The model configuration; `transformer_impl` decides between Transformer Engine and the local
            implementation.
        vp_stage: Virtual pipeline stage to build, None without a virtual pipeline.

    Raises:
        ValueError: The MLP of the configuration has its norm inside.
    """
    spec = layer_specs.layer_spec(config, vp_stage)
    if not isinstance(spec, TransformerBlockSubmodules):
        return _with_norms_after(spec, config.transformer)
    layers = [_with_norms_after(layer, config.transformer) for layer in spec.layer_specs]
    return dataclasses.replace(spec, layer_specs=layers)


def _with_norms_after(spec: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """Return a layer with its norms moved: its linear layers have none inside."""
    if spec.submodules.mlp.func != MLP.as_mlp_submodule:
        raise ValueError(
            "--use-transformer-engine-op-fuser joins an MLP with the norm before it, and OLMo-2 has its norm "
            "after it; drop the flag"
        )
    linear = ColumnParallelLinear if _is_local(config) else TEColumnParallelLinear
    attention, mlp = spec.submodules.self_attention, spec.submodules.mlp.keywords["submodules"]
    layer = dataclasses.replace(
        spec.submodules,
        input_layernorm=IdentityOp,
        self_attention=dataclasses.replace(
            attention,
            module=NormedSelfAttention,
            submodules=dataclasses.replace(attention.submodules, linear_qkv=linear),
        ),
        pre_mlp_layernorm=IdentityOp,
        mlp=functools.partial(
            NormedMLP.as_mlp_submodule, submodules=dataclasses.replace(mlp, linear_fc1=linear)
        ),
        sharded_state_dict_keys_map={},
    )
    return dataclasses.replace(spec, submodules=layer)
