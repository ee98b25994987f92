"""GPU memory of the ranks of a training run, counted from its shape.

Rows count as full, which packed rows are; with --no-packing the numbers are an upper bound.
Weights, gradients and optimizer state are counted. Activations are counted tensor by tensor: the ones that
the layers of Transformer Engine, or Megatron's local ones on a GPU, keep for the backward pass
(docs/scaling.md compares them with real runs). Not known: fp8, offloading, a free pipeline layout, a
reference model.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace

from checkpoint_conversion.adapters.options import ALL_LINEAR
from megatron_profit.estimates import state_activations
from megatron_profit.estimates.parameter_counts import (
    Parameters,
    stage_parameters,
    trained_parameters,
)
from megatron_profit.estimates.run_shape import LayerKind, RunShape

GIB = 2**30
# CUDA context, NCCL's buffers, cuBLAS's workspaces; an assumption, not a measurement.
RUNTIME_BYTES = 4 * GIB
# Memory that the allocator holds and may be unable to use; also an assumption.
FRAGMENTATION = 0.05
_DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPUs of a pipeline rank.

    Attributes:
        stage: The pipeline rank.
        parameters: Number of its parameters.
        weights, gradients, optimizer: State that lasts.
        activations: Kept for the backward passes of all micro-batches under way.
        working: Additional memory of a layer's or the output layer's computation at its peak.
        runtime: CUDA, NCCL, cuBLAS and the allocator's losses, assumed.
    """

    stage: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    runtime: int

    @property
    def total(self) -> int:
        state = self.weights + self.gradients + self.optimizer
        return state + self.activations + self.working + self.runtime


def estimate(
    run: RunShape, supervised_share: float = 1.0, expert_load: float = 1.5
) -> list[Memory]:
    """Return the memory of each pipeline rank.

    Args:
        run: The run's shape.
        supervised_share: Supervised tokens over all; the output layer works on no others.
        expert_load: Tokens at the busiest rank's experts over the mean.
    """
    return [_stage(run, stage, supervised_share, expert_load) for stage in range(run.pp)]


def _stage(run: RunShape, stage: int, supervised_share: float, expert_load: float) -> Memory:
    trained, parameters = trained_parameters(run, stage), stage_parameters(run, stage)
    if run.args.lora_rank is not None:
        parameters += trained
    activations, working = _activations(run, stage, expert_load)
    if stage == run.pp - 1:
        kept, peak = output_bytes(run, supervised_share)
        activations, working = activations + kept, max(working, peak)
    memory = Memory(
        stage=stage,
        parameters=parameters.total,
        weights=parameters.total * run.bytes_per_number,
        gradients=trained.total * gradient_bytes(run.args),
        optimizer=optimizer_state(run, trained),
        activations=activations,
        working=working,
        runtime=0,
    )
    return replace(memory, runtime=RUNTIME_BYTES + int(FRAGMENTATION * memory.total))


def gradient_bytes(args: Namespace) -> int:
    """Return the bytes of a parameter's gradient in Megatron's buffer."""
    if args.bf16:
        fp32 = args.accumulate_allreduce_grads_in_fp32 or args.main_grads_dtype == "fp32"
        return 4 if fp32 and not args.grad_reduce_in_bf16 else 2
    return 2 if args.fp16 and not args.accumulate_allreduce_grads_in_fp32 else 4


def optimizer_bytes(args: Namespace) -> int:
    """Return the bytes of Adam's state of a parameter.

    It has two moments, and in half precision a main copy in fp32. For example, bf16 with fp32
    gradients takes 12 bytes.
    """
    if not (args.bf16 or args.fp16):
        return 8
    if not args.use_precision_aware_optimizer:
        # Gradients in half precision are copied to fp32 for the step.
        return 12 + (4 if gradient_bytes(args) == 2 else 0)
    moments = _DTYPE_BYTES[args.exp_avg_dtype] + _DTYPE_BYTES[args.exp_avg_sq_dtype]
    # Of a main copy in fp32, only the bits that the bf16 parameter lacks are kept.
    main = (
        2
        if args.bf16 and args.main_params_dtype == "fp32"
        else _DTYPE_BYTES[args.main_params_dtype]
    )
    return moments + main


def optimizer_state(run: RunShape, parameters: Parameters) -> int:
    """Return the bytes of the optimizer on a rank, which the distributed one splits over the data-parallel
    group.
    """
    bytes_per_parameter = optimizer_bytes(run.args)
    if not run.args.use_distributed_optimizer:
        return parameters.total * bytes_per_parameter
    instances = run.args.num_distributed_optimizer_instances
    dense = parameters.dense / (run.dp * run.cp // instances)
    experts = parameters.experts / max(1, run.expert_dp // instances)
    return math.ceil((dense + experts) * bytes_per_parameter)


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that a layer keeps of a micro-batch for its backward pass.

    Attributes:
        entry: Its input, the residual stream.
        norms: The outputs of the two norms, and the tensors that they keep inside.
        attention: Queries, keys and values before and after norm and rotation, context, log-sum-exp.
        middle: The residual stream after attention.
        mlp: Inputs and outputs of the activation function.
        router: Logits, probabilities and the experts' inputs.
        adapters: The tensors between A and B of all projections, and what their dropout keeps.
    """

    entry: int
    norms: int
    attention: int
    middle: int
    mlp: int
    router: int = 0
    adapters: int = 0

    @property
    def total(self) -> int:
        parts = (self.entry, self.norms, self.attention, self.middle, self.mlp)
        return sum(parts) + self.router + self.adapters


def layer_activations(run: RunShape, kind: LayerKind, expert_load: float) -> LayerActivations:
    """Return the bytes that a layer keeps, before any recomputation."""
    args, number, tokens = run.args, run.bytes_per_number, run.tokens
    stream = tokens * args.hidden_size * number // run.sequence_split
    query, key_value = run.query_size // run.tp, run.key_value_size // run.tp
    attention = state_activations.kept_bytes(run) if kind.state else _attention_bytes(run)
    norms = 2 * stream
    if not run.fused:  # a norm of single operations keeps what it has normalised, before its weight
        norms += 2 * stream
        is_split = run.normalizes_projections and run.tp > 1  # then computed as one operation
        if run.query_key_norms and not is_split and not kind.state:
            norms += tokens * (query + key_value) * number
    if not kind.experts:
        mlp = tokens * _gated_mlp(run, args.ffn_hidden_size // run.tp) * number
        inner = tokens * args.ffn_hidden_size // run.tp
        low = _between_factors(run, kind, tokens, tokens)
        low += _dropped_inputs(run, kind, tokens * args.hidden_size // run.sequence_split, inner)
        return LayerActivations(stream, norms, attention, stream, mlp, 0, low)
    # Each token goes to `topk` experts; the ranks that share an expert gather its tokens.
    local = tokens / run.sequence_split * args.moe_router_topk * run.etp * expert_load
    expert = _gated_mlp(run, args.moe_ffn_hidden_size // run.etp)
    router = tokens // run.sequence_split * args.num_experts * 4 * 2
    router += int(local * args.hidden_size * number)
    inner = int(local * args.moe_ffn_hidden_size // run.etp)
    low = _between_factors(run, kind, tokens, int(local))
    low += _dropped_inputs(run, kind, int(local * args.hidden_size), inner)
    mlp = int(local * expert * number)
    if args.moe_shared_expert_intermediate_size:
        shared = _gated_mlp(run, args.moe_shared_expert_intermediate_size // run.tp)
        mlp += tokens * shared * number + stream
    return LayerActivations(stream, norms, attention, stream, mlp, router, low)


def _attention_bytes(run: RunShape) -> int:
    """Return the bytes that attention keeps of a micro-batch."""
    args, tokens = run.args, run.tokens
    query, key_value = run.query_size // run.tp, run.key_value_size // run.tp
    # Under context parallelism keys and values of whole rows are gathered (docs/training.md).
    keys = args.seq_length * args.micro_batch_size if run.cp > 1 else tokens
    # The projection's output, the norm's copy of its queries, rotated queries, keys, values, context.
    queries = 3 * query + (query if run.query_key_norms else 0)
    # The gate, and the context that it has multiplied.
    queries += 2 * query if args.attention_output_gate else 0
    numbers = tokens * (queries + 2 * key_value) + keys * 2 * key_value
    return numbers * run.bytes_per_number + tokens * args.num_attention_heads // run.tp * 4


def _between_factors(run: RunShape, kind: LayerKind, tokens: int, mlp_tokens: int) -> int:
    """Return the bytes between A and B, scaled once: four projections of attention or five of a Gated
    DeltaNet, and three of the MLP.
    """
    rank = run.args.lora_rank or 0
    return 2 * rank * ((5 if kind.state else 4) * tokens + 3 * mlp_tokens) * run.bytes_per_number


def _dropped_inputs(run: RunShape, kind: LayerKind, mlp_input: int, inner: int) -> int:
    """Return the bytes that a dropout keeps: for each projection with adapters, its input and a mask.

    Args:
        run: The run's shape.
        kind: The kind of the layer.
        mlp_input: Numbers of the MLP's input on this rank.
        inner: Numbers of the input of down_proj.
    """
    args = run.args
    if not args.lora_dropout:
        return 0
    stream = run.tokens * args.hidden_size // run.sequence_split
    if kind.state:
        names = (
            ("in_proj_qkvz", "in_proj_ba")
            if run.is_qwen3_next
            else ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
        )
        inputs = dict.fromkeys(names, stream)
        inputs["out_proj"] = run.tokens * run.state_values // run.tp
    else:
        inputs = dict.fromkeys(("q_proj", "k_proj", "v_proj"), stream)
        inputs["o_proj"] = run.tokens * run.query_size // run.tp
    inputs |= dict.fromkeys(("gate_proj", "up_proj"), mlp_input) | {"down_proj": inner}
    targets = args.lora_targets or (ALL_LINEAR,)
    numbers = sum(size for name, size in inputs.items() if name in targets or ALL_LINEAR in targets)
    return numbers * (run.bytes_per_number + 1)


def _gated_mlp(run: RunShape, size: int) -> int:
    """Return the numbers of a token in an MLP: gate, up and their product; unfused, silu(gate) and up once
    more.
    """
    return size * (3 if run.fused else 5)


def kept_activations(run: RunShape, kind: LayerKind, expert_load: float) -> int:
    """Return the bytes that a layer keeps if it is not fully recomputed."""
    parts = layer_activations(run, kind, expert_load)
    if run.args.recompute_granularity != "selective":
        return parts.total
    modules = run.args.recompute_modules or ["core_attn"]
    if "core_attn" in modules and not kind.state:
        heads = run.args.num_attention_heads // run.tp
        parts = replace(parts, attention=parts.attention - run.tokens * heads * 4)
    if "gdn_norm_out" in modules and kind.state:
        attention = parts.attention - state_activations.norm_bytes(run)
        parts = replace(parts, attention=attention)
    if "layernorm" in modules:
        parts = replace(parts, norms=0)
    if ("moe" if kind.experts else "mlp") in modules:
        parts = replace(parts, mlp=0, router=0)
    elif kind.experts and "moe_act" in modules:
        parts = replace(parts, mlp=parts.mlp * 2 // 3)
    return parts.total


def _chunk_activations(run: RunShape, layers: Sequence[int], expert_load: float) -> tuple[int, int]:
    """Return the bytes that a model chunk keeps of a micro-batch, and the bytes that are recomputed at one
    time.
    """
    args = run.args
    kinds = {kind: kept_activations(run, kind, expert_load) for kind in set(run.kinds)}
    kept = [kinds[run.kinds[layer]] for layer in layers]
    if args.recompute_granularity != "full":
        return sum(kept), 0
    split = run.tp if args.distribute_saved_activations else run.sequence_split
    entry = run.tokens * args.hidden_size * run.bytes_per_number // split
    together = args.recompute_num_layers or 1
    if args.recompute_method == "block":
        return entry * min(together, len(layers)) + sum(kept[together:]), max(kept, default=0)
    return entry * math.ceil(len(layers) / together), max(kept, default=0) * min(
        together, len(layers)
    )


def chunks_under_way(run: RunShape, stage: int) -> int:
    """Return the model chunks whose activations a pipeline rank holds at its peak.

    They follow megatron/core/pipeline_parallel/schedules.py, get_pp_rank_microbatches. For example, the first
    of 4 pipeline ranks without virtual stages holds 4 micro-batches.
    """
    chunks = run.micro_batches * run.virtual_stages
    if run.pp == 1:
        return 1
    behind = run.pp - stage - 1
    if run.virtual_stages == 1:
        return min(behind + 1, chunks)
    group = run.args.microbatch_group_size_per_vp_stage or run.pp
    return min(2 * behind + (run.virtual_stages - 1) * group + 1, chunks)


def _activations(run: RunShape, stage: int, expert_load: float) -> tuple[int, int]:
    """Return the bytes that a pipeline rank keeps, and the bytes that the computed layer needs
    in addition.
    """
    chunks = (_chunk_activations(run, chunk, expert_load) for chunk in run.chunks_of(stage))
    kept, recomputed = map(max, zip(*chunks, strict=True))
    kinds = {run.kinds[layer] for layer in run.layers_of(stage)}
    working = recomputed + max(
        (_layer_working(run, kind, expert_load) for kind in kinds), default=0
    )
    return kept * chunks_under_way(run, stage), working


def _layer_working(run: RunShape, kind: LayerKind, expert_load: float) -> int:
    """Return the bytes of an MLP's backward pass, or of a Gated DeltaNet's if it needs more: its gathered
    input, the input's gradient and the inner gradients.
    """
    parts = layer_activations(run, kind, expert_load)
    gathered = 2 * run.tokens * run.args.hidden_size * run.bytes_per_number
    inner = parts.mlp + 2 * parts.router
    return gathered + max(inner, state_activations.working_bytes(run) if kind.state else 0)


def output_bytes(run: RunShape, supervised_share: float) -> tuple[int, int]:
    """Return the bytes of the last norm and the linear objective (docs/kernel.md) on a micro-batch.

    Returns:
        The bytes that last until the backward pass, and the additional bytes at the peak of that pass.
    """
    from megatron_profit.ops.tiling import Tiling

    args, tokens = run.args, run.tokens
    import torch

    dtype = torch.float32 if run.bytes_per_number == 4 else torch.bfloat16
    rows = math.ceil(tokens * supervised_share)
    vocab, hidden, number = args.padded_vocab_size // run.tp, args.hidden_size, run.bytes_per_number
    weight = torch.empty(vocab, hidden, dtype=dtype, device="meta")
    tiling = Tiling.of(weight, rows, None, args.objective_backward)
    # The norm's input; under sequence parallelism the gathered output in place of its own.
    norm = (1 if run.fused else 2) * tokens * hidden * number // run.sequence_split
    kept = norm + tokens * hidden * number + tiling.kept_rows * vocab * number
    block = rows * min(tiling.columns, vocab) * number
    # Supervised rows, their gradient in fp32 and all rows' gradient; the weight's gradient for autograd.
    gradients = rows * hidden * (number + 4) + tokens * hidden * number
    weight_gradient = vocab * hidden * number if args.lora_rank is None else 0
    return kept, block + gradients + weight_gradient
