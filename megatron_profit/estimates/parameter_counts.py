"""Numbers of parameters of layers and pipeline stages on one rank."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from checkpoint_conversion.adapters.options import ALL_LINEAR
from megatron_profit.estimates.run_shape import LayerKind, RunShape


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


def layer_parameters(run: RunShape, kind: LayerKind) -> Parameters:
    """Return the parameters of a layer on a rank."""
    args, hidden = run.args, run.args.hidden_size
    mixer = _state_parameters(run) if kind.state else _attention_parameters(run)
    dense = mixer + 2 * hidden
    if not kind.experts:
        return Parameters(dense + 3 * hidden * args.ffn_hidden_size // run.tp)
    if args.moe_shared_expert_intermediate_size:
        dense += 3 * hidden * args.moe_shared_expert_intermediate_size // run.tp
        dense += hidden * args.moe_shared_expert_gate
    expert = 3 * hidden * args.moe_ffn_hidden_size // run.etp
    return Parameters(dense + hidden * args.num_experts, args.num_experts // run.ep * expert)


def _attention_parameters(run: RunShape) -> int:
    args, hidden = run.args, run.args.hidden_size
    qkv = run.query_size * (2 if args.attention_output_gate else 1) + 2 * run.key_value_size
    count = (hidden * qkv + run.query_size * hidden) // run.tp
    if args.add_qkv_bias:
        count += qkv // run.tp
    return count + run.query_key_norms


def _state_parameters(run: RunShape) -> int:
    """Return the parameters of a Gated DeltaNet: projections, convolution, decays and the heads' norm."""
    args, heads = run.args, run.args.linear_num_value_heads
    channels = 2 * run.state_keys + run.state_values
    inputs = channels + run.state_values + 2 * heads
    count = args.hidden_size * (inputs + run.state_values)
    count += channels * args.linear_conv_kernel_dim + 2 * heads
    return count // run.tp + args.linear_value_head_dim


def adapter_parameters(run: RunShape, kind: LayerKind) -> Parameters:
    """Return the parameters of a layer's adapters on a rank.

    A factor is split like the outputs or inputs of its projection; the other one is on every rank. For
    example, q_proj has A [rank, hidden] whole and B [query / tp, rank].
    """
    args, rank = run.args, run.args.lora_rank
    if rank is None:
        return Parameters()
    targets = args.lora_targets or (ALL_LINEAR,)

    def size(**inner: int) -> int:
        """Return the parameters of projections between the hidden size and inner ones on this rank."""
        own = [inner[name] for name in inner if name in targets or ALL_LINEAR in targets]
        return sum(rank * (args.hidden_size + size) for size in own)

    query, key_value = run.query_size // run.tp, run.key_value_size // run.tp
    gated = query * (2 if args.attention_output_gate else 1)
    dense = size(q_proj=gated, k_proj=key_value, v_proj=key_value, o_proj=query)
    if kind.state:
        keys, values = run.state_keys // run.tp, run.state_values // run.tp
        heads = args.linear_num_value_heads // run.tp
        if run.is_qwen3_next:
            inputs = size(in_proj_qkvz=2 * keys + 2 * values, in_proj_ba=2 * heads)
        else:
            inputs = size(in_proj_qkv=2 * keys + values, in_proj_z=values)
            inputs += size(in_proj_b=heads, in_proj_a=heads)
        dense = inputs + size(out_proj=values)

    def mlp(inner: int) -> int:
        return size(gate_proj=inner, up_proj=inner, down_proj=inner)

    if not kind.experts:
        return Parameters(dense + mlp(args.ffn_hidden_size // run.tp))
    experts = args.num_experts // run.ep * mlp(args.moe_ffn_hidden_size // run.etp)
    if args.moe_shared_expert_intermediate_size:
        dense += mlp(args.moe_shared_expert_intermediate_size // run.tp)
        if not run.is_qwen3_next:  # the routed experts are one tensor, which gets no adapters
            experts = 0
    return Parameters(dense, experts)


def trained_parameters(run: RunShape, stage: int) -> Parameters:
    """Return the parameters of a pipeline rank that get gradients: its adapters, or all without adapters."""
    if run.args.lora_rank is None:
        return stage_parameters(run, stage)
    total = Parameters()
    for layer in run.layers_of(stage):
        total += adapter_parameters(run, run.kinds[layer])
    return total


def saved_parameters(run: RunShape) -> int:
    """Return the parameters that a checkpoint holds over all ranks: the model's, or its adapters' alone."""
    return trained_parameters(whole_model(run), 0).total


def whole_model(run: RunShape) -> RunShape:
    """Return the run on one rank, which holds the whole model."""
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
    return RunShape(Namespace(**{**vars(run.args), **sizes, **splits}), 1)


def stage_parameters(run: RunShape, stage: int) -> Parameters:
    """Return the parameters of a pipeline rank: its layers, and embedding, last norm and output layer where
    they are. Adapters are not among them.
    """
    args = run.args
    total = Parameters()
    kinds = [run.kinds[layer] for layer in run.layers_of(stage)]
    for kind in set(kinds):
        one, count = layer_parameters(run, kind), kinds.count(kind)
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
