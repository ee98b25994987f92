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
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict

from checkpoint_conversion.errors import ConversionError
from megatron_profit.commands.run_shape import read_run
from megatron_profit.data.errors import DataError
from megatron_profit.estimates.communication import Machine, sent_bytes, step_time
from megatron_profit.estimates.memory import GIB, estimate
from megatron_profit.estimates.run_shape import RunShape, ShapeError
from megatron_profit.flags import ArgumentsError


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
