"""The layers with Gated DeltaNet in a layer spec."""

from __future__ import annotations

import dataclasses

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_gated_delta_net_module_spec,
    get_linear_attention_pattern,
)
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_profit.models.gated_delta_net.layer import HeadNorm, PackedGatedDeltaNet

# The local layers' norms have, in a checkpoint, the names of Transformer Engine's.
_LOCAL_KEYS = {
    "input_layernorm.": "self_attention.in_proj.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
# The variant's name in Megatron-Core 0.19; 0.20 renames it in the configuration.
VARIANTS = ("gated_delta_net", "gdn")


def has_delta_net(layer: ModuleSpec) -> bool:
    """Return whether Megatron's spec of a layer has a Gated DeltaNet."""
    return layer.submodules.self_attention.module is GatedDeltaNet


def with_packed_delta_net(layer: ModuleSpec) -> ModuleSpec:
    """Return a layer whose Gated DeltaNet keeps the records of a row apart.

    Args:
        layer: Megatron's spec of a layer with Transformer Engine and a Gated DeltaNet.
    """
    return _with_attention(layer, _packed(layer.submodules.self_attention))


def with_local_delta_nets(
    layers: list[ModuleSpec], config: TransformerConfig, vp_stage: int | None
) -> list[ModuleSpec]:
    """Return local layers, some of them with a Gated DeltaNet in place of attention.

    Args:
        layers: The attention layers of a pipeline stage.
        config: The configuration, whose `linear_attention_freq` says which layers have a Gated DeltaNet.
        vp_stage: Virtual pipeline stage, None without a virtual pipeline.
    """
    stock = get_gated_delta_net_module_spec(config, backend=LocalSpecProvider())
    attention = _packed(stock, in_proj=ColumnParallelLinear)
    pattern = get_linear_attention_pattern(config)
    return [
        _with_attention(layer, attention, sharded_state_dict_keys_map=_LOCAL_KEYS)
        if pattern[number]
        else layer
        for number, layer in zip(_layers_of_stage(config, vp_stage), layers, strict=True)
    ]


def _packed(attention: ModuleSpec, **parts: type) -> ModuleSpec:
    submodules = dataclasses.replace(attention.submodules, out_norm=HeadNorm, **parts)
    return dataclasses.replace(attention, module=PackedGatedDeltaNet, submodules=submodules)


def _with_attention(layer: ModuleSpec, attention: ModuleSpec, **changes: object) -> ModuleSpec:
    submodules = dataclasses.replace(layer.submodules, self_attention=attention, **changes)
    return dataclasses.replace(layer, submodules=submodules)


def _layers_of_stage(config: TransformerConfig, vp_stage: int | None) -> list[int]:
    """Return the numbers, from 0, of the layers of this rank's pipeline stage."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage)))
