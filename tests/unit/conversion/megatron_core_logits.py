"""Loads each checkpoint of a folder into Megatron-Core's GPTModel and saves the logits of given tokens.

Models with experts are also loaded as grouped experts, and those saved as FOLDER/<name>-grouped.

python megatron_core_logits.py FOLDER, with FOLDER/jobs.json: the Megatron arguments by name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_profit.megatron_patches import activate

activate("cpu")

import torch
from grouped_experts import group_experts
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import import_module
from megatron.core.transformer.transformer_config import TransformerConfig

# What Megatron's own command line makes of the arguments (megatron/training/argument_utils.py).
_CONFIG_NAMES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups",
    "kv_channels": "kv_channels",
    "normalization": "normalization",
    "layernorm_epsilon": "layernorm_epsilon",
    "add_bias_linear": "add_bias_linear",
    "add_qkv_bias": "add_qkv_bias",
    "qk_layernorm": "qk_layernorm",
    "attention_dropout": "attention_dropout",
    "hidden_dropout": "hidden_dropout",
    "swiglu": "gated_linear_unit",
    "num_experts": "num_moe_experts",
    "moe_ffn_hidden_size": "moe_ffn_hidden_size",
    "moe_layer_freq": "moe_layer_freq",
    "moe_router_topk": "moe_router_topk",
    "moe_router_score_function": "moe_router_score_function",
    "moe_router_pre_softmax": "moe_router_pre_softmax",
    "moe_router_load_balancing_type": "moe_router_load_balancing_type",
    "moe_aux_loss_coeff": "moe_aux_loss_coeff",
    "moe_router_dtype": "moe_router_dtype",
}


def build(arguments: dict[str, Any]) -> GPTModel:
    config = TransformerConfig(
        **{name: arguments[key] for key, name in _CONFIG_NAMES.items() if key in arguments},
        activation_func=torch.nn.functional.silu,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        moe_token_dispatcher_type="allgather",
        transformer_impl="local",
    )
    if "spec" in arguments:  # layers that Megatron-Core does not have
        spec = import_module(arguments["spec"])(SimpleNamespace(transformer=config))
    else:
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization
        )
    scaling = {}
    if arguments["use_rope_scaling"]:
        scaling = {"rope_scaling": True, "rope_scaling_factor": arguments["rope_scaling_factor"]}
    return GPTModel(
        config,
        spec,
        vocab_size=arguments["vocab_size"],
        max_sequence_length=arguments["max_position_embeddings"],
        share_embeddings_and_output_weights=not arguments["untie_embeddings_and_output_weights"],
        position_embedding_type=arguments["position_embedding_type"],
        rotary_percent=arguments["rotary_percent"],
        rotary_base=arguments["rotary_base"],
        **scaling,
    ).eval()


def load(model: GPTModel, checkpoint: Path) -> None:
    """Load a checkpoint under Megatron-Core's default strictness; every parameter must be in it."""
    request = model.sharded_state_dict()
    loaded = dist_checkpointing.load(request, str(checkpoint))
    own = model.state_dict().keys()  # grouped experts ask for a state of each, and keep one
    model.load_state_dict({key: loaded[key] for key in request if key in own}, strict=True)


def main() -> None:
    folder = Path(sys.argv[1])
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    tokens = torch.load(folder / "tokens.pt")
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    causal = torch.ones(1, 1, tokens.size(1), tokens.size(1)).triu(1).bool()
    for name, arguments in json.loads((folder / "jobs.json").read_text()).items():
        model = build(arguments)
        load(model, folder / f"{name}-megatron" / "release")
        with torch.no_grad():
            torch.save(model(tokens, positions, causal), folder / f"{name}.pt")
        if "num_experts" in arguments:
            model = build(arguments)
            group_experts(model)
            load(model, folder / f"{name}-megatron" / "release")
            (folder / f"{name}-grouped").mkdir()
            dist_checkpointing.save(model.sharded_state_dict(), str(folder / f"{name}-grouped"))


if __name__ == "__main__":
    main()
