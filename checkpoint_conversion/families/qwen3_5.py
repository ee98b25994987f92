"""Qwen3.5, 3.6, 3.7 and 3.8, which share one architecture, and Qwen3-Next before them.

Three Gated DeltaNet layers, then one of gated attention; a dense MLP, or experts with a shared one. The
published checkpoints also hold a vision tower and layers that predict further tokens (MTP): the language
model is below `model.language_model.`, and its configuration is `text_config`. transformers writes the
language model alone, too. Names: transformers/models/qwen3_5, qwen3_5_moe and qwen3_next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families.config import TEXT, ConfigReader, text_config
from checkpoint_conversion.families.decoder import (
    Decoder,
    Part,
    decoder_arguments,
    dense_mlp,
    model_rules,
    one_by_one,
    packed_experts,
    read_decoder,
    router,
    separate_experts,
    shared_expert,
)
from checkpoint_conversion.families.family import Config, Family, TensorRule
from checkpoint_conversion.families.gated_delta_net import (
    FULL,
    LINEAR,
    DeltaNet,
    delta_net,
    delta_net_arguments,
    fused_projections,
    gated_attention,
    read_delta_net,
    separate_projections,
)
from checkpoint_conversion.families.qwen3_moe import expert_arguments, read_experts

_REQUIRED = {
    "attention_bias": False,
    "attn_output_gate": True,
    "output_gate_type": "swish",
    "mamba_ssm_dtype": "float32",
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
# Defaults of the configuration classes in transformers, which leaves such values out of a `text_config`.
_DEFAULTS = {
    "vocab_size": 248320,
    "num_attention_heads": 16,
    "max_position_embeddings": 32768,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
}
_DENSE = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
_EXPERTS = {
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "router_aux_loss_coef": 0.001,
}
_NEXT = {
    "vocab_size": 151936,
    "num_hidden_layers": 48,
    "num_experts": 512,
    "num_experts_per_tok": 10,
}
# The positions of text, height and width are equal in a text, so it does not matter which of them turns a
# dimension.
_ROPE_IGNORED = ("mrope_section", "mrope_interleaved")
_ROTARY_FRACTION = 0.25

Projections = Callable[[Decoder, DeltaNet], list[Part]]
Experts = Callable[[Decoder, int, int], list[Part]]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """One of the architectures.

    Attributes:
        name: Its name in messages.
        defaults: Defaults of its configuration class.
        required: Values that its keys must have, besides the ones of all.
        with_vision: Whether the language model is a part of a model with a vision tower.
        projections: The parts of a Gated DeltaNet's fused projection.
    """

    name: str
    defaults: dict[str, Any]
    required: dict[str, Any] = dataclasses.field(default_factory=dict)
    with_vision: bool = False
    projections: Projections = separate_projections

    @property
    def has_experts(self) -> bool:
        return "num_experts" in self.defaults

    def reader(self, config: Config) -> ConfigReader:
        if self.with_vision != (TEXT in config):
            where = "a" if self.with_vision else "no"
            raise ConversionError(
                f"config.json declares architectures={config.get('architectures')!r}, for which it must "
                f"have {where} {TEXT}; correct the file"
            )
        return ConfigReader(
            text_config(config),
            self.name,
            {**_REQUIRED, **self.required},
            {**_DEFAULTS, **self.defaults},
            rotary_fraction=_ROTARY_FRACTION,
            rope_ignored=_ROPE_IGNORED,
            layer_kinds=(LINEAR, FULL),
        )

    def decoder(self, read: ConfigReader) -> Decoder:
        base = "model.language_model." if self.with_vision else "model."
        return dataclasses.replace(read_decoder(read), base=base)


def _megatron_arguments(kind: _Kind, config: Config) -> dict[str, Any]:
    read = kind.reader(config)
    model = kind.decoder(read)
    arguments = decoder_arguments(model) | delta_net_arguments(read, model, read_delta_net(read))
    if not kind.has_experts:
        return arguments
    return {
        **arguments,
        **expert_arguments(read_experts(read)),
        "moe_shared_expert_intermediate_size": read.size("shared_expert_intermediate_size"),
        "moe_shared_expert_gate": True,
    }


def _tensor_rules(kind: _Kind, experts: Experts, config: Config) -> tuple[TensorRule, ...]:
    read = kind.reader(config)
    model, linear = kind.decoder(read), read_delta_net(read)
    mlp = _mlp(kind, read, model, experts)
    mixers = {
        True: delta_net(model, linear, kind.projections(model, linear)),
        False: gated_attention(model),
    }
    layers = [[*mixers[is_linear], *mlp] for is_linear in linear.linear_layers]
    return model_rules(model, one_by_one(model, layers))


def _mlp(kind: _Kind, read: ConfigReader, model: Decoder, experts: Experts) -> list[Part]:
    if not kind.has_experts:
        return dense_mlp(model)
    found = read_experts(read)
    return [
        *router(model, found.count),
        *experts(model, found.count, found.ffn),
        *shared_expert(model, read.size("shared_expert_intermediate_size")),
    ]


def _family(kind: _Kind, architecture: str, model_type: str) -> Family:
    """Return the family; experts are packed in one tensor, except in Qwen3-Next, or else one by one."""
    forms: tuple[Experts, ...] = (packed_experts, separate_experts)
    if kind.projections is fused_projections:
        forms = (separate_experts, packed_experts)
    first, *others = (partial(_tensor_rules, kind, experts) for experts in forms)
    embedding = "model.language_model." if kind.with_vision else "model."
    return Family(
        (architecture,),
        model_type,
        partial(_megatron_arguments, kind),
        first,
        other_forms=tuple(others) if kind.has_experts else (),
        carried=("model.visual.", "mtp."),
        tied_alias=("lm_head.weight", f"{embedding}embed_tokens.weight"),
    )


_MOE = _Kind("Qwen3.5-MoE", _EXPERTS, {"norm_topk_prob": True})
_DENSE_KIND = _Kind("Qwen3.5", _DENSE)
QWEN3_5 = (
    _family(_DENSE_KIND, "Qwen3_5ForCausalLM", "qwen3_5_text"),
    _family(
        dataclasses.replace(_DENSE_KIND, with_vision=True),
        "Qwen3_5ForConditionalGeneration",
        "qwen3_5",
    ),
    _family(_MOE, "Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"),
    _family(
        dataclasses.replace(_MOE, with_vision=True),
        "Qwen3_5MoeForConditionalGeneration",
        "qwen3_5_moe",
    ),
    _family(
        _Kind("Qwen3-Next", {**_EXPERTS, **_NEXT}, projections=fused_projections),
        "Qwen3NextForCausalLM",
        "qwen3_next",
    ),
)
