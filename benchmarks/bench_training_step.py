"""Measure whole training steps: a Megatron run with stock SFT, with ProFit masked afterwards, with ours.

    python benchmarks/bench_training_step.py --quick
    python benchmarks/bench_training_step.py --layers 28 --seq-length 4096 --micro-batch-size 2  # on a GPU
    python benchmarks/bench_training_step.py --processes 2 -- --tensor-model-parallel-size 2

A model of Qwen3-0.6B's shape (few layers on a CPU, the whole vocabulary) with random weights trains
through the entry `megatron_profit.sft`. Only the loss differs:

    stock      Megatron's own cross-entropy, every supervised token
    masked     the same, its loss masked by p >= tau afterwards
    official   ProFit as its released code computes it, on all logits (one tensor-parallel rank only)
    ours       the objective of this project

Runs are short and take turns. Arguments after `--` go to Megatron. The results go to
benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import benchmarking
import torch
from training_inputs import QWEN3_06B, REPOSITORY, write_chats, write_model

if TYPE_CHECKING:
    from megatron_profit.training.step.batch import Batch
    from megatron_profit.training.step.forward_step import BatchLoss

LOSSES = ("ours", "stock", "masked", "official")
# Steps at the start of a run that are not counted, in which memory is mapped and code compiled.
WARM_UP = 1
REPORT = "benchmark: "


def write_inputs(folder: Path, options: argparse.Namespace) -> None:
    """Write a HuggingFace folder of the wanted shape without weights, and chats of the wanted lengths."""
    sizes = QWEN3_06B | {"num_hidden_layers": options.layers}
    model = write_model(folder / "hf", sizes)
    # Answers are cut where the row ends.
    lengths = (int(options.seq_length * options.prompt), options.seq_length * 2)
    write_chats(folder / "chats.jsonl", model, [lengths] * 64)


def training_flags(folder: Path, options: argparse.Namespace) -> list[str]:
    """Return the flags of every run. The learning rate is almost 0, so that p does not change."""
    flags = {
        "--hf-model": folder / "hf",
        "--data": folder / "chats.jsonl",
        "--seq-length": options.seq_length,
        "--micro-batch-size": options.micro_batch_size,
        "--global-batch-size": options.micro_batch_size * options.micro_batches,
        "--train-iters": WARM_UP + options.steps,
        "--lr": 1e-12,
        "--lr-decay-style": "constant",
        "--objective": "profit",
        "--prob-threshold": options.tau,
        "--threshold-direction": "higher",
        "--device": options.device,
    }
    return [str(part) for pair in flags.items() for part in pair] + [
        *("--random-init", "--log-interval", "1", "--no-packing"),
        *(["--bf16"] if options.dtype == "bf16" else []),
        *options.megatron,
    ]


def run_once(loss: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run once in fresh processes; return the seconds of each counted step, peak bytes and kept fraction."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(options.processes), __file__, "--worker", loss]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads // options.processes or 1)}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [*command, *training_flags(folder, options)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if result.returncode:
        raise SystemExit(f"the run with the loss {loss} failed:\n{result.stdout[-4000:]}")
    times = re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", result.stdout)
    reports = [
        json.loads(line) for line in re.findall(rf"^{REPORT}(.*)$", result.stdout, re.MULTILINE)
    ]
    kept = re.findall(r"\| kept fraction: (\S+)", result.stdout)
    return {
        "seconds": [float(time) / 1e3 for time in times[WARM_UP:]],
        "peak_bytes": max(report["peak"] for report in reports),
        "steady_bytes": max(report["before"] for report in reports),
        "kept": float(kept[-1]) if kept else None,
        "tokens": reports[0]["tokens"],
    }


def worker(loss: str) -> None:
    """Run a training process: the project's entry with another loss. At the end it reports its memory."""
    from megatron_profit.megatron_patches import activate

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    flags = sys.argv[1:]
    device = activate(flags[flags.index("--device") + 1])
    from megatron.training import get_args

    from megatron_profit.training import main

    make_forward_step = main.make_forward_step
    watch: list[benchmarking.PeakMemory] = []

    def make_watched_step(begin: Callable[[Batch], BatchLoss]) -> Callable:
        step = make_forward_step(begin_with(loss, begin))

        def forward_step(data_iterator: Iterator, model: Any) -> Any:
            if not watch and get_args().curr_iteration >= WARM_UP:
                watch.append(benchmarking.peak_memory(device))
            return step(data_iterator, model)

        return forward_step

    vars(main)["make_forward_step"] = make_watched_step
    main.main(flags, device)
    args = get_args()
    report = {
        "before": watch[0].before,
        "peak": watch[0].before + watch[0].peak(),
        "tokens": args.global_batch_size * args.seq_length,
    }
    print(f"\n{REPORT}{json.dumps(report)}", flush=True)


def begin_with(
    loss: str, begin: Callable[[Batch], BatchLoss]
) -> Callable[[Batch], BatchLoss | PeerLoss]:
    """Return the beginning of a micro-batch with another loss; with "ours", the run's own."""
    return begin if loss == "ours" else lambda batch: PeerLoss(loss, batch.labels)


class PeerLoss:
    """A micro-batch [B, S] with Megatron's output layer and cross-entropy, or the official formula."""

    def __init__(self, loss: str, labels: torch.Tensor) -> None:
        self._loss, self._supervised = loss, labels != -100
        self.model_kwargs = {"output_processor": official} if loss == "official" else {}

    def loss_func(self, token_loss: torch.Tensor) -> tuple:
        from megatron.training import get_args

        token_loss, kept = token_loss.float(), self._supervised
        if self._loss != "stock":
            (tau,) = get_args().prob_threshold
            kept = kept & (token_loss.detach().neg().exp() >= float(tau))
        total, count = (token_loss * kept).sum(), self._supervised.sum()
        share = torch.stack([kept.sum().float(), count.float()])
        return total, count.int(), {"kept fraction": share}


def official(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """Return the per-token loss [B, S] from fp32 logits, after the released code's softmax for p."""
    logits, _bias = output_layer(hidden_states, weight=output_weight)
    logits = logits.transpose(0, 1).flatten(0, 1).float()
    labels_N = labels.flatten()
    with torch.no_grad():
        logits.softmax(-1).gather(1, labels_N.clamp(min=0)[:, None])
    loss = torch.nn.functional.cross_entropy(logits, labels_N, ignore_index=-100, reduction="none")
    return loss.view(labels.shape)


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the measurements of several runs of one loss."""
    seconds = [value for run in runs for value in run["seconds"]]
    return {
        **{key: runs[0][key] for key in ("kept", "tokens")},
        "seconds": seconds,
        "median": median(seconds),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "steady_bytes": max(run["steady_bytes"] for run in runs),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    ours = results["ours"]["median"]
    rows = []
    for name, result in results.items():
        if "absent" in result:
            rows.append([name, f"absent: {result['absent']}", *[""] * 5])
            continue
        rows.append(
            [
                name,
                f"{1e3 * result['median']:,.0f}",
                f"{1e3 * min(result['seconds']):,.0f} to {1e3 * max(result['seconds']):,.0f}",
                f"{result['median'] / ours:.2f}",
                f"{result['tokens'] / result['median']:,.0f}",
                f"{result['peak_bytes'] / benchmarking.MIB:,.0f}",
                f"{(result['peak_bytes'] - result['steady_bytes']) / benchmarking.MIB:,.0f}",
            ]
        )
    header = ["", "median ms", "range ms", "x ours", "tokens/s", "peak MiB", "of it in the step"]
    return benchmarking.markdown_table(header, rows)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    own, _, megatron = " ".join(map(shlex.quote, argv)).partition(" -- ")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer steps and runs: 4 minutes on 2 CPU cores"
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step")
    parser.add_argument("--prompt", type=float, default=0.5, help="share of a row")
    parser.add_argument(
        "--tau", type=float, default=3e-6, help="drops about half with random weights"
    )
    parser.add_argument("--steps", type=int, help="counted steps of a run: 5, with --quick 3")
    parser.add_argument("--rounds", type=int, help="runs of each loss: 3, with --quick 2")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="bf16, or fp32 on a CPU that computes bf16 slowly"
    )
    parser.add_argument("--out", type=Path, default=benchmarking.RESULTS)
    parser.add_argument("--name", default="training-step", help="of the results files")
    options = parser.parse_args(shlex.split(own))
    options.megatron = shlex.split(megatron)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or benchmarking.fast_dtype(options.device)
    options.steps = options.steps or (3 if options.quick else 5)
    options.rounds = options.rounds or (2 if options.quick else 3)
    if "ours" not in options.losses:
        parser.error("--losses must name ours, which the others are compared with")
    return options


def main(argv: Sequence[str]) -> int:
    """Measure all losses in turn, print a table, and write it with its JSON."""
    options = parse_arguments(argv)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.losses}
    absent: dict[str, str] = {}
    if "--tensor-model-parallel-size" in options.megatron and "official" in runs:
        del runs["official"]
        absent["official"] = "knows no tensor parallelism"
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), options)
        for _ in range(options.rounds):
            for name, done in runs.items():
                done.append(run_once(name, Path(folder), options))
                print(f"{name}: {[round(s, 2) for s in done[-1]['seconds']]} s", flush=True)
    results: dict[str, dict[str, Any]] = {name: summary(done) for name, done in runs.items()}
    results |= {name: {"absent": reason} for name, reason in absent.items()}
    environment = benchmarking.environment(torch.device(options.device))
    record = {
        "environment": {**environment, "threads": options.threads, "processes": options.processes},
        "command": shlex.join(["python", "benchmarks/bench_training_step.py", *argv]),
        "settings": {k: str(v) for k, v in vars(options).items() if k != "out"},
        "results": results,
    }
    text = (
        f"Qwen3-0.6B's shape with {options.layers} layers, vocabulary {QWEN3_06B['vocab_size']:,}, "
        f"{options.dtype}, {options.micro_batches} x {options.micro_batch_size} rows of "
        f"{options.seq_length} tokens, {options.prompt:.0%} prompt; "
        f"ours keeps {results['ours']['kept']:.0%} of the supervised tokens.\n"
        f"Medians over {options.rounds} runs of {options.steps} steps that take turns. Peak: of the largest "
        "process; of it in the step: what is not there between steps.\n\n"
    )
    page = benchmarking.write_results(
        options.out,
        f"{options.name}-{options.device}",
        record,
        "A whole training step",
        text + table(results),
    )
    print(f"{table(results)}\nresults: {page}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        loss = sys.argv.pop(2)
        sys.argv.pop(1)
        worker(loss)
    else:
        sys.exit(main(sys.argv[1:]))
