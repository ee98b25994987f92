"""GPU memory of a training run before it is started, by the same flags or for a published model.

    megatron-profit estimate --model Qwen3-14B --gpus 8 --gpu-memory 80 --seq-length 8192 \
        --micro-batch-size 1 --global-batch-size 32 --tensor-model-parallel-size 4 --sequence-parallel \
        --use-distributed-optimizer --bf16

Except for this tool's own, all flags are the training's (`-m megatron_profit.sft`), read by its parser, so a
command line can be pasted as it is. For each pipeline rank it shows weights, gradients, optimizer,
activations and the output layer, and whether the largest fits. Next to them it shows Megatron's own estimate
(megatron/training/theoretical_memory_usage.py) and why the two differ.

Rows count as full, which packed rows are; with --no-packing the numbers are an upper bound.
Weights, gradients and optimizer state are counted. Activations are counted tensor by tensor: the ones that
the layers of Transformer Engine, or Megatron's local ones on a GPU, keep for the backward pass
(docs/scaling.md compares them with real runs). Not known: fp8, offloading, a free pipeline layout, a
reference model.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from checkpoint_conversion.cli import FlagHelp
from megatron_profit.commands.parameter_counts import (
    Parameters,
    stage_parameters,
    trained_parameters,
)
from megatron_profit.commands.run_shape import RunShape, ShapeError, read_run

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
        adapters: The tensors between A and B of all projections.
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


def layer_activations(run: RunShape, has_experts: bool, expert_load: float) -> LayerActivations:
    """Return the bytes that a layer keeps, before any recomputation."""
    args, number, tokens = run.args, run.bytes_per_number, run.tokens
    stream = tokens * args.hidden_size * number // run.sequence_split
    heads = args.num_attention_heads // run.tp
    query, key_value = run.query_size // run.tp, run.key_value_size // run.tp
    # Under context parallelism keys and values of whole rows are gathered (docs/training.md).
    keys = args.seq_length * args.micro_batch_size if run.cp > 1 else tokens
    # The projection's output, the norm's copy of its queries, rotated queries, keys, values, context.
    copied = query if args.qk_layernorm else 0
    attention = (tokens * (3 * query + 2 * key_value + copied) + keys * 2 * key_value) * number
    attention += tokens * heads * 4
    norms = 2 * stream
    if not run.fused:  # a norm of single operations keeps what it has normalised, before its weight
        norms += 2 * stream + (tokens * (query + key_value) * number if args.qk_layernorm else 0)
    if not has_experts:
        mlp = tokens * _gated_mlp(run, args.ffn_hidden_size // run.tp) * number
        low = _between_factors(run, tokens, tokens)
        return LayerActivations(stream, norms, attention, stream, mlp, 0, low)
    # Each token goes to `topk` experts; the ranks that share an expert gather its tokens.
    local = tokens / run.sequence_split * args.moe_router_topk * run.etp * expert_load
    expert = _gated_mlp(run, args.moe_ffn_hidden_size // run.etp)
    router = tokens // run.sequence_split * args.num_experts * 4 * 2
    router += int(local * args.hidden_size * number)
    low = _between_factors(run, tokens, int(local))
    mlp = int(local * expert * number)
    return LayerActivations(stream, norms, attention, stream, mlp, router, low)


def _between_factors(run: RunShape, tokens: int, mlp_tokens: int) -> int:
    """Return the bytes between A and B: four projections of attention and three of the MLP, scaled once."""
    rank = run.args.lora_rank or 0
    return 2 * rank * (4 * tokens + 3 * mlp_tokens) * run.bytes_per_number


def _gated_mlp(run: RunShape, size: int) -> int:
    """Return the numbers of a token in an MLP: gate, up and their product; unfused, silu(gate) and up once
    more.
    """
    return size * (3 if run.fused else 5)


def kept_activations(run: RunShape, has_experts: bool, expert_load: float) -> int:
    """Return the bytes that a layer keeps if it is not fully recomputed."""
    parts = layer_activations(run, has_experts, expert_load)
    if run.args.recompute_granularity != "selective":
        return parts.total
    modules = run.args.recompute_modules or ["core_attn"]
    if "core_attn" in modules:
        heads = run.args.num_attention_heads // run.tp
        parts = replace(parts, attention=parts.attention - run.tokens * heads * 4)
    if "layernorm" in modules:
        parts = replace(parts, norms=0)
    if ("moe" if has_experts else "mlp") in modules:
        parts = replace(parts, mlp=0, router=0)
    elif has_experts and "moe_act" in modules:
        parts = replace(parts, mlp=parts.mlp * 2 // 3)
    return parts.total


def _chunk_activations(run: RunShape, layers: Sequence[int], expert_load: float) -> tuple[int, int]:
    """Return the bytes that a model chunk keeps of a micro-batch, and the bytes that are recomputed at one
    time.
    """
    args = run.args
    kept = [kept_activations(run, run.expert_layers[layer], expert_load) for layer in layers]
    if args.recompute_granularity != "full":
        return sum(kept), 0
    split = run.tp if args.distribute_saved_activations else run.sequence_split
    entry = run.tokens * args.hidden_size * run.bytes_per_number // split
    together = args.recompute_num_layers or 1
    if args.recompute_method == "block":
        return entry * min(together, len(layers)) + sum(kept[together:]), max(kept)
    return entry * math.ceil(len(layers) / together), max(kept) * min(together, len(layers))


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
    has_experts = any(run.expert_layers[layer] for layer in run.layers_of(stage))
    working = recomputed + _layer_working(run, has_experts, expert_load)
    return kept * chunks_under_way(run, stage), working


def _layer_working(run: RunShape, has_experts: bool, expert_load: float) -> int:
    """Return the bytes of an MLP's backward pass: its gathered input, the input's gradient and the inner
    gradients.
    """
    parts = layer_activations(run, has_experts, expert_load)
    gathered = 2 * run.tokens * run.args.hidden_size * run.bytes_per_number
    return gathered + parts.mlp + 2 * parts.router


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
    norm = (2 if run.fused else 3) * tokens * hidden * number // run.sequence_split
    gathered = tokens * hidden * number if run.sequence_split > 1 else 0
    kept = norm + gathered + tiling.kept_rows * vocab * number
    block = rows * min(tiling.columns, vocab) * number
    # Supervised rows, their gradient in fp32 and all rows' gradient; the weight's gradient for autograd.
    gradients = rows * hidden * (number + 4) + tokens * hidden * number
    weight_gradient = vocab * hidden * number if args.lora_rank is None else 0
    return kept, block + gradients + weight_gradient


def megatron_estimate(run: RunShape) -> dict[str, float]:
    """Return Megatron's own estimate of the most loaded rank, in bytes."""
    from megatron.training import theoretical_memory_usage as theirs

    args = Namespace(**vars(run.args))
    args.data_parallel_size, args.world_size = run.dp, run.gpus
    args.expert_tensor_parallel_size = run.etp
    args.virtual_pipeline_model_parallel_size = (
        run.virtual_stages if run.virtual_stages > 1 else None
    )
    if args.num_query_groups is None or not args.group_query_attention:
        args.num_query_groups = args.num_attention_heads
    state = theirs.compute_weight_and_optimizer_memory(args)
    with_sp = args.sequence_parallel and args.recompute_granularity == "selective"
    activations = (
        theirs.compute_activation_memory if with_sp else theirs.compute_activation_memory_without_sp
    )(args, num_microbatches=run.micro_batches)
    return {"state": state, "activations": activations, "total": state + activations}


DIFFERENCES = """\
Why they differ: Megatron's estimate counts 18 bytes a parameter (6 and 12 / dp with the distributed
optimizer) as this one does in bf16, but not context parallelism in dp, nor other precisions. Its
activations have neither the gated MLP's real size, nor grouped-query attention, experts, context
parallelism or full recomputation, and its output layer holds logits of all tokens, which the linear
objective never has. It leaves out working memory and runtime, and knows no adapters."""


def table(run: RunShape, memories: Sequence[Memory], gpu_memory: float | None) -> str:
    """Return the estimate as a table for people."""
    names = ("weights", "gradients", "optimizer", "activations", "working", "runtime", "total")
    lines = [
        f"{run.gpus} GPUs: tensor {run.tp}, pipeline {run.pp} (x {run.virtual_stages} chunks), "
        f"context {run.cp}, data {run.dp}, expert {run.ep} x tensor {run.etp}",
        f"{run.micro_batches} micro-batches of {run.args.micro_batch_size} x {run.args.seq_length} tokens",
        "",
        f"{'GiB a GPU':<16}{'parameters':>12}" + "".join(f"{name:>13}" for name in names),
    ]
    for memory in memories:
        cells = "".join(f"{getattr(memory, name) / GIB:>13.2f}" for name in names)
        lines.append(f"pipeline rank {memory.stage:<2}{memory.parameters / 1e9:>10.3f} B{cells}")
    theirs = megatron_estimate(run)
    largest = max(memories, key=lambda memory: memory.total)
    lines += [
        "",
        f"Megatron's own estimate: {theirs['state'] / GIB:.2f} weights, gradients and optimizer + "
        f"{theirs['activations'] / GIB:.2f} activations = {theirs['total'] / GIB:.2f} GiB.",
        DIFFERENCES,
    ]
    if gpu_memory is not None:
        fits = largest.total <= gpu_memory * GIB
        verdict = "fits" if fits else "does NOT fit"
        lines += ["", f"{largest.total / GIB:.1f} GiB {verdict} a GPU of {gpu_memory:g} GiB."]
    return "\n".join(lines)


def as_json(run: RunShape, memories: Sequence[Memory], gpu_memory: float | None) -> str:
    """Return the estimate as JSON for programs, in bytes."""
    largest = max(memory.total for memory in memories)
    fits = None if gpu_memory is None else largest <= gpu_memory * GIB
    ranks = [{**asdict(memory), "total": memory.total} for memory in memories]
    result = {"largest": largest, "fits": fits, "ranks": ranks, "megatron": megatron_estimate(run)}
    return json.dumps(result, indent=2)


def parse_arguments(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Return this tool's arguments, and the training's."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="megatron-profit estimate --gpus N [--model NAME] [options] [training flags]",
        formatter_class=FlagHelp,
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, required=True, help="processes of the whole run")
    parser.add_argument(
        "--model", help="a published model, such as Qwen3-14B, in place of --hf-model"
    )
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="of a GPU; exit code 1 if too small"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")
    parser.add_argument(
        "--supervised-share", type=float, default=1.0, help="supervised tokens over all (default 1)"
    )
    parser.add_argument(
        "--expert-load", type=float, default=1.5, help="tokens at the busiest experts over the mean"
    )
    options, training = parser.parse_known_args(argv)
    if options.gpus < 1:
        parser.error(f"--gpus is {options.gpus}; it must be at least 1")
    if not 0 < options.supervised_share <= 1:
        parser.error(f"--supervised-share is {options.supervised_share}; it must be in (0, 1]")
    if options.expert_load < 1:
        parser.error(f"--expert-load is {options.expert_load}; it must be at least 1")
    return options, training


def main(argv: Sequence[str] | None = None) -> int:
    """Print the estimate; 0 if it fits, 1 if not, 2 for bad input."""
    options, training = parse_arguments(sys.argv[1:] if argv is None else argv)
    with contextlib.redirect_stdout(io.StringIO()):  # of Megatron's import
        from megatron_profit.flags import ArgumentsError
    from checkpoint_conversion.errors import ConversionError
    from megatron_profit.data import DataError

    try:
        run = read_run(training, options.gpus, options.model)
    except (ShapeError, ArgumentsError, ConversionError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    memories = estimate(run, options.supervised_share, options.expert_load)
    print((as_json if options.json else table)(run, memories, options.gpu_memory))
    largest = max(memory.total for memory in memories)
    return int(options.gpu_memory is not None and largest > options.gpu_memory * GIB)
