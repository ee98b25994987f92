"""Numbers of parameters of layers and pipeline stages on one rank."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from checkpoint_conversion.adapters.options import ALL_LINEAR
from megatron_profit.estimates.run_shape import RunShape


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters on a rank.

    Attributes:
        dense: All parameters except the experts'.
        experts: Parameters of the rank's experts.
    """

    dense: int = 0
    experts: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.dense + other.dense, self.experts + other.experts)

    @property
    def total(self) -> int:
        return self.dense + self.experts


def layer_parameters(run: RunShape, has_experts: bool) -> Parameters:
    """Return the parameters of a layer on a rank."""
    args, hidden = run.args, run.args.hidden_size
    qkv = run.query_size + 2 * run.key_value_size
    dense = (hidden * qkv + run.query_size * hidden) // run.tp + 2 * hidden
    if args.add_qkv_bias:
        dense += qkv // run.tp
    dense += run.query_key_norms
    if not has_experts:
        return Parameters(dense + 3 * hidden * args.ffn_hidden_size // run.tp)
    expert = 3 * hidden * args.moe_ffn_hidden_size // run.etp
    return Parameters(dense + hidden * args.num_experts, args.num_experts // run.ep * expert)


def adapter_parameters(run: RunShape, has_experts: bool) -> Parameters:
    """Return the parameters of a layer's adapters on a rank.

    A factor is split like the outputs or inputs of its projection; the other one is on every rank. For
    example, q_proj has A [rank, hidden] whole and B [query / tp, rank].
    """
    args, rank = run.args, run.args.lora_rank
    if rank is None:
        return Parameters()
    targets = args.lora_targets or (ALL_LINEAR,)

    def size(name: str, inner: int) -> int:
        is_target = name in targets or ALL_LINEAR in targets
        return rank * (args.hidden_size + inner) * is_target

    query, key_value = run.query_size // run.tp, run.key_value_size // run.tp
    dense = size("q_proj", query) + size("o_proj", query)
    dense += size("k_proj", key_value) + size("v_proj", key_value)
    ffn = args.moe_ffn_hidden_size // run.etp if has_experts else args.ffn_hidden_size // run.tp
    mlp = sum(size(name, ffn) for name in ("gate_proj", "up_proj", "down_proj"))
    if not has_experts:
        return Parameters(dense + mlp)
    return Parameters(dense, args.num_experts // run.ep * mlp)


def trained_parameters(run: RunShape, stage: int) -> Parameters:
    """Return the parameters of a pipeline rank that get gradients: its adapters, or all without adapters."""
    if run.args.lora_rank is None:
        return stage_parameters(run, stage)
    total = Parameters()
    for layer in run.layers_of(stage):
        total += adapter_parameters(run, run.expert_layers[layer])
    return total


def saved_parameters(run: RunShape) -> int:
    """Return the parameters that a checkpoint holds over all ranks: the model's, or its adapters' alone."""
    sizes = dict.fromkeys(
        (
            *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
            *("context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"),
        ),
        1,
    )
    splits = dict.fromkeys(
        (
            *("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage"),
            *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
        ),
        False,
    )
    return trained_parameters(
        RunShape(Namespace(**{**vars(run.args), **sizes, **splits}), 1), 0
    ).total


def stage_parameters(run: RunShape, stage: int) -> Parameters:
    """Return the parameters of a pipeline rank: its layers, and embedding, last norm and output layer where
    they are. Adapters are not among them.
    """
    args = run.args
    total = Parameters()
    has_experts = [run.expert_layers[layer] for layer in run.layers_of(stage)]
    for kind in set(has_experts):
        one, count = layer_parameters(run, kind), has_experts.count(kind)
        total += Parameters(one.dense * count, one.experts * count)
    vocabulary = args.padded_vocab_size // run.tp * args.hidden_size
    last = stage == run.pp - 1
    if stage == 0:
        total += Parameters(vocabulary)
    if last:
        total += Parameters(args.hidden_size)
    # Tied embeddings are one tensor on one rank, and a copy on the last of several.
    if last and (args.untie_embeddings_and_output_weights or run.pp > 1):
        total += Parameters(vocabulary)
    return total
