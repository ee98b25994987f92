"""GPU memory of a training run before it is started, by the same flags or for a published model.

    megatron-profit estimate --model Qwen3-14B --gpus 8 --gpu-memory 80 --seq-length 8192 \
        --micro-batch-size 1 --global-batch-size 32 --tensor-model-parallel-size 4 --sequence-parallel \
        --use-distributed-optimizer --bf16

Except for this tool's own, all flags are the training's (`-m megatron_profit.sft`), read by its parser, so a
command line can be pasted as it is. For each pipeline rank it shows weights, gradients, optimizer,
activations and the output layer, and whether the largest fits. Next to them it shows Megatron's own estimate
(megatron/training/theoretical_memory_usage.py) and why the two differ.

docs/scaling.md lists what they count.
"""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict

from checkpoint_conversion.cli import FlagHelp
from megatron_profit.commands.run_shape import read_run
from megatron_profit.estimates.memory import GIB, Memory, estimate
from megatron_profit.estimates.parameter_counts import saved_parameters
from megatron_profit.estimates.run_shape import RunShape, ShapeError
from megatron_profit.estimates.saving import checkpoint_bytes, describe_save


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
    theirs, saved = megatron_estimate(run), checkpoint_bytes(vars(run.args), saved_parameters(run))
    largest = max(memories, key=lambda memory: memory.total)
    lines += [
        "",
        f"A checkpoint takes {describe_save(saved)}.",
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
    result = {
        "largest": largest,
        "fits": fits,
        "ranks": ranks,
        "checkpoint": checkpoint_bytes(vars(run.args), saved_parameters(run)),
        "megatron": megatron_estimate(run),
    }
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
    from checkpoint_conversion.errors import ConversionError
    from megatron_profit.data import DataError
    from megatron_profit.flags import ArgumentsError

    try:
        run = read_run(training, options.gpus, options.model)
    except (ShapeError, ArgumentsError, ConversionError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    memories = estimate(run, options.supervised_share, options.expert_load)
    print((as_json if options.json else table)(run, memories, options.gpu_memory))
    largest = max(memory.total for memory in memories)
    return int(options.gpu_memory is not None and largest > options.gpu_memory * GIB)
