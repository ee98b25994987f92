r"""Estimate the bytes that each GPU sends in a training step, and their share of its time on a machine.

    python tools/estimate_communication.py --model Qwen3-14B --gpus 16 --seq-length 8192 \
        --micro-batch-size 1 --global-batch-size 32 --tensor-model-parallel-size 4 --sequence-parallel \
        --use-distributed-optimizer --bf16
    python tools/estimate_communication.py --table

The flags are tools/estimate_memory.py's. `--table` prints the layouts of docs/scaling.md with both
estimates. Bytes are counted from the collectives of Megatron and of this project, as a ring sends them.
A test compares them with the collectives of a real run. Times are bytes over an assumed bandwidth: a
model, not a measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_profit.commands.estimate_memory import GIB, estimate, gradient_bytes
from megatron_profit.commands.parameter_counts import stage_parameters
from megatron_profit.commands.run_shape import RunShape, ShapeError, read_run


@dataclass(frozen=True)
class Machine:
    """The assumed speed of a GPU and its links.

    Attributes:
        gpus_per_node: GPUs that share the fast links.
        flops: Operations a second of the model's products, attention included.
        node_bandwidth: Bytes a second that a GPU sends within the node.
        network_bandwidth: Bytes a second that a GPU sends to other nodes.
    """

    gpus_per_node: int = 8
    flops: float = 450e12
    node_bandwidth: float = 300e9
    network_bandwidth: float = 40e9

    def seconds(self, sent: float, reach: int) -> float:
        """Return the time to send bytes in groups that span `reach` consecutive ranks."""
        near = reach <= self.gpus_per_node
        return sent / (self.node_bandwidth if near else self.network_bandwidth)


@dataclass(frozen=True)
class Sent:
    """Bytes that the busiest GPU of a pipeline rank sends in a step."""

    tensor: float
    pipeline: float
    context: float
    expert: float
    data: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step if nothing overlaps.

    Attributes:
        compute: Products of the model, recomputation included.
        bubble: Waiting in the pipeline.
        tensor, pipeline, context, expert, data: Sending.
    """

    compute: float
    bubble: float
    tensor: float
    pipeline: float
    context: float
    expert: float
    data: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def sent_bytes(run: RunShape, stage: int, supervised_share: float = 1.0) -> Sent:
    """Return the bytes that a GPU of a pipeline rank sends in a step.

    Args:
        run: The run.
        stage: The pipeline rank.
        supervised_share: Supervised tokens over all. Without sequence parallelism the output layer
            sends no others.
    """
    layers = [run.expert_layers[layer] for layer in run.layers_of(stage)]
    return Sent(
        tensor=run.micro_batches * _tensor(run, layers, stage, supervised_share),
        pipeline=_pipeline(run, stage),
        context=run.micro_batches * len(layers) * _context(run),
        expert=run.micro_batches * sum(layers) * _expert(run),
        data=_data(run, stage),
    )


def _forwards(run: RunShape) -> int:
    """Return how often a layer's forward pass runs for a backward pass."""
    return 2 if run.args.recompute_granularity == "full" else 1


def _ring(ranks: int) -> float:
    """Return the part of a gathered tensor that each rank sends."""
    return (ranks - 1) / ranks


def _tensor(run: RunShape, layers: Sequence[bool], stage: int, supervised_share: float) -> float:
    """Return the bytes of tensor parallelism for a micro-batch.

    A unit is an all-gather or a reduce-scatter of the residual stream; an all-reduce is two units. With
    sequence parallelism, each pair of products gathers and scatters in the forward pass. In the
    backward pass it gathers its input again, scatters the input's gradient and gathers the output's.
    Without it, there is one all-reduce in each pass.
    """
    unit = run.tokens * run.args.hidden_size * run.bytes_per_number * _ring(run.tp)
    if run.args.sequence_parallel:
        forward, backward, entry, output = 2, 3, 2, 2.0
    else:
        forward, backward, entry, output = 2, 2, 2, 2 * supervised_share
    pair = forward * _forwards(run) + backward
    # The experts of a layer take the place of its second pair; they count under expert parallelism.
    pairs = sum(1 if has_experts else 2 for has_experts in layers)
    ends = entry * (stage == 0) + output * (stage == run.pp - 1)
    return unit * (pair * pairs + ends)


def _pipeline(run: RunShape, stage: int) -> float:
    """Return the bytes of pipeline parallelism.

    Activations go to the next chunk of the model and their gradients to the one before. The gradient of
    tied embeddings is sent too.
    """
    if run.pp == 1:
        return 0
    unit = run.tokens * run.args.hidden_size * run.bytes_per_number / run.sequence_split
    sends = 2 * run.virtual_stages - (stage == 0) - (stage == run.pp - 1)
    sent = run.micro_batches * sends * unit
    if not run.args.untie_embeddings_and_output_weights and stage in (0, run.pp - 1):
        sent += (
            run.args.padded_vocab_size / run.tp * run.args.hidden_size * gradient_bytes(run.args)
        )
    return sent


def _context(run: RunShape) -> float:
    """Return the bytes of context parallelism for a layer and a micro-batch.

    Keys and values of whole rows are gathered, and their gradients scattered.
    """
    if run.cp == 1:
        return 0
    keys_values = run.args.seq_length * run.args.micro_batch_size * 2 * run.key_value_size / run.tp
    return keys_values * run.bytes_per_number * _ring(run.cp) * (_forwards(run) + 1)


def _expert(run: RunShape) -> float:
    """Return the bytes of expert parallelism for a layer and a micro-batch.

    Tokens go to their experts and back. Ranks that share an expert gather and scatter among them. The
    gradients do the same.
    """
    tokens = run.tokens / run.sequence_split * run.args.moe_router_topk
    unit = tokens * run.args.hidden_size * run.bytes_per_number
    passes = _forwards(run) + 1
    return 2 * passes * unit * (_ring(run.ep) + run.etp * _ring(run.etp))


def _data(run: RunShape, stage: int) -> float:
    """Return the bytes of data parallelism.

    Gradients are scattered and parameters gathered. Without the distributed optimizer, gradients are
    all-reduced.
    """
    parameters = stage_parameters(run, stage)
    gradient = gradient_bytes(run.args)
    distributed = run.args.use_distributed_optimizer
    each = gradient + run.bytes_per_number if distributed else 2 * gradient
    dense = parameters.dense * _ring(run.dp * run.cp)
    return each * (dense + parameters.experts * _ring(max(1, run.expert_dp)))


def step_flops(run: RunShape) -> float:
    """Return the operations of a step over all GPUs, recomputation included.

    Every row is taken as one record without padding.
    """
    args, hidden = run.args, run.args.hidden_size
    passes = _forwards(run) + 2
    projections = hidden * (2 * run.query_size + 2 * run.key_value_size)
    layer = 0.0
    for has_experts in run.expert_layers:
        mlp = 3 * hidden * args.ffn_hidden_size
        if has_experts:
            mlp = 3 * hidden * args.moe_ffn_hidden_size * args.moe_router_topk
            mlp += hidden * args.num_experts
        # Causal attention: queries meet half of the row's keys, in two products.
        layer += 2 * (projections + mlp) + 4 * run.query_size * args.seq_length / 2
    # The linear objective computes the logits of kept tokens twice if it does not keep them.
    output = (
        2 * hidden * args.padded_vocab_size * (4 if args.objective_backward == "recompute" else 3)
    )
    tokens = args.seq_length * args.micro_batch_size * run.dp * run.micro_batches
    return tokens * (layer * passes + output)


def step_time(run: RunShape, machine: Machine) -> StepTime:
    """Return the time of a step on the machine's busiest GPU, if nothing overlaps."""
    sent = [sent_bytes(run, stage) for stage in range(run.pp)]
    most = Sent(*(max(getattr(s, name) for s in sent) for name in Sent.__dataclass_fields__))
    stride = run.tp * run.cp
    compute = step_flops(run) / run.gpus / machine.flops
    tensor = machine.seconds(most.tensor, run.tp)
    context = machine.seconds(most.context, stride)
    expert = machine.seconds(most.expert, run.ep * run.etp)
    bubble = (compute + tensor + context + expert) * (run.pp - 1)
    return StepTime(
        compute=compute,
        bubble=bubble / (run.micro_batches * run.virtual_stages),
        tensor=tensor,
        pipeline=machine.seconds(most.pipeline, run.gpus),
        context=context,
        expert=expert,
        data=machine.seconds(most.data, run.gpus // run.pp),
    )


def describe(run: RunShape, machine: Machine) -> str:
    """Return the estimate as text."""
    time = step_time(run, machine)
    sent = [sent_bytes(run, stage) for stage in range(run.pp)]
    lines = [f"{'':<12}{'GiB sent a GPU':>16}{'seconds':>10}{'of the step':>13}"]
    for name, seconds in asdict(time).items():
        most = max((getattr(s, name, 0) for s in sent), default=0)
        amount = f"{most / GIB:>16.2f}" if hasattr(sent[0], name) else " " * 16
        lines.append(f"{name:<12}{amount}{seconds:>10.3f}{seconds / time.total:>12.1%}")
    lines.append(f"{'step':<12}{'':>16}{time.total:>10.3f}      if nothing overlaps")
    return "\n".join(lines)


_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
_TP4, _TP8 = (f"--tensor-model-parallel-size {n} --sequence-parallel" for n in (4, 8))
# 94 layers, embedding and output layer make 96.
_EVEN = "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
_EXPERTS = f"{_EVEN} --expert-model-parallel-size 8 --expert-tensor-parallel-size 1 {_FULL}"
_PP4, _PP8 = (f"{_TP4} --pipeline-model-parallel-size {n} {_EXPERTS}" for n in (4, 8))
# Model, GPUs, rows of a step, layout; shown in docs/scaling.md.
RECOMMENDED = (
    ("Qwen3-14B", 8, 4, f"{_TP4} {_FULL}"),
    ("Qwen3-14B", 16, 4, _TP4),
    ("Qwen3-14B", 8, 32, f"{_TP4} {_FULL}"),
    ("Qwen3-14B", 16, 32, _TP4),
    ("Qwen3-14B", 64, 32, _TP4),
    ("Qwen3-14B", 1024, 1024, _TP4),
    ("Qwen3-32B", 16, 4, f"{_TP8} {_FULL}"),
    ("Qwen3-32B", 16, 32, f"{_TP8} {_FULL}"),
    ("Qwen3-32B", 32, 32, _TP8),
    ("Qwen3-32B", 128, 32, _TP8),
    ("Qwen3-32B", 1024, 1024, _TP8),
    ("Qwen3-235B-A22B", 128, 128, _PP8),
    ("Qwen3-235B-A22B", 256, 256, _PP8),
    ("Qwen3-235B-A22B", 512, 512, _PP4),
    ("Qwen3-235B-A22B", 1024, 1024, _PP4),
)


@functools.cache
def recommended_run(model: str, gpus: int, batch: int, layout: str) -> RunShape:
    """Return a row of the table, with rows of 8,192 tokens."""
    flags = "--seq-length 8192 --micro-batch-size 1 --bf16 --use-distributed-optimizer"
    return read_run(
        [*flags.split(), "--global-batch-size", str(batch), *layout.split()], gpus, model
    )


def table(machine: Machine) -> str:
    """Return the layouts of docs/scaling.md in Markdown."""
    names = ("tensor", "pipeline", "context", "expert", "data")
    lines = [
        "| model | GPUs | rows | TP x PP x EP, DP | recompute | GiB a GPU | "
        + "GiB sent a step: "
        + " / ".join(names)
        + " | compute | bubble | sending |",
        "|---|---:|---:|---|---|---:|---|---:|---:|---:|",
    ]
    for model, gpus, batch, layout in RECOMMENDED:
        run = recommended_run(model, gpus, batch, layout)
        memory = max(m.total for m in estimate(run)) / GIB
        sent = [sent_bytes(run, stage) for stage in range(run.pp)]
        amounts = (max(getattr(s, name) for s in sent) / GIB for name in names)
        time = step_time(run, machine)
        sending = time.total - time.compute - time.bubble
        full = "full" if run.args.recompute_granularity == "full" else "none"
        shares = " | ".join(f"{t / time.total:.0%}" for t in (time.compute, time.bubble, sending))
        lines.append(
            f"| {model.removeprefix('Qwen3-')} | {gpus:,} | {batch} "
            f"| {run.tp} x {run.pp} x {run.ep}, {run.dp} | {full} | {memory:.0f} "
            f"| {' / '.join(map(_short, amounts))} | {shares} |"
        )
    return "\n".join(lines)


def _short(gib: float) -> str:
    if gib == 0:
        return "-"
    return f"{gib:.0f}" if gib >= 10 else f"{gib:.{max(0, 1 - math.floor(math.log10(gib)))}f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the estimate, or the table; return 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="python tools/estimate_communication.py (--table | --gpus N [--model NAME] [training flags])",
        allow_abbrev=False,
    )
    parser.add_argument("--table", action="store_true", help="print the layouts of docs/scaling.md")
    parser.add_argument("--gpus", type=int, default=1, help="processes of the whole run")
    parser.add_argument(
        "--model", help="a published model, such as Qwen3-14B, in place of --hf-model"
    )
    parser.add_argument(
        "--flops", type=float, default=Machine.flops, help="operations a second of a GPU"
    )
    parser.add_argument(
        "--node-bandwidth",
        type=float,
        default=Machine.node_bandwidth,
        help="bytes a second in a node",
    )
    parser.add_argument(
        "--network-bandwidth",
        type=float,
        default=Machine.network_bandwidth,
        help="bytes a second and GPU between nodes",
    )
    options, training = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    machine = Machine(
        flops=options.flops,
        node_bandwidth=options.node_bandwidth,
        network_bandwidth=options.network_bandwidth,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron's import prints
        from megatron_profit.flags import ArgumentsError
    from checkpoint_conversion.errors import ConversionError
    from megatron_profit.data import DataError

    try:
        if options.table:
            print(table(machine))
        else:
            print(describe(read_run(training, options.gpus, options.model), machine))
    except (ShapeError, ArgumentsError, ConversionError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
