"""Measure the output layer with ProFit, forward and backward, against other implementations.

    python benchmarks/bench_objective.py --quick
    python benchmarks/bench_objective.py --full --verl ~/verl      # on GPUs
    python benchmarks/bench_objective.py --hidden 2560 --masks 0/0 0.5/0.2 --only ours matmuls

All computations of a configuration get the same tensors and take turns. Some know no objective. They
compute a cross-entropy per token and are masked afterwards, as their users do. A computation that
cannot run here is listed with the reason. The results go to benchmarks/results as a dated JSON and
Markdown file. It is rewritten after each configuration, so an interrupted run has one too.

Shape suffixes: N tokens, M supervised tokens, H hidden, V vocabulary rows of this rank.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import itertools
import os
import shlex
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import benchmarking
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional

from megatron_profit.objectives import build_objective
from megatron_profit.ops import linear_objective
from megatron_profit.training.process.shutdown import end_communication

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QWEN3_VOCAB, QWEN3_5_VOCAB = 151936, 248320
# Defaults of the flags: two sizes for 2 CPU cores, and the whole grid.
DEFAULTS: dict[str, Any] = {
    "vocab": [QWEN3_VOCAB],
    "hidden": [1024],
    "tokens": [1024],
    "masks": [(0.5, 0.2)],
    "tp": [1],
    "ours": [],
    "rounds": 5,
}
PRESETS: dict[str | None, dict[str, Any]] = {
    None: {},
    "quick": {
        "masks": [(0.5, 0.2), (0.0, 0.0)],
        "ours": ["backward=recompute", "extra_statistics=rank+lower_mass"],
        "rounds": 3,
    },
    "full": {
        "vocab": [QWEN3_VOCAB, QWEN3_5_VOCAB],
        "hidden": [1024, 2560, 5120],
        "tokens": [1024, 8192],
        "masks": list(itertools.product((0.0, 0.5, 0.8), (0.0, 0.2, 0.5))),
        "dtype": ["fp32", "bf16"],
        "tp": [1, 2],
        "ours": ["backward=recompute"],
    },
}
PEER_PACKAGES = ("transformer_engine", "liger-kernel", "trl", "cut-cross-entropy")
# Vocabulary entries of a tile, as TRL's trainers call its function.
TRL_TILE = 32768
NAMES = (
    *("ours", "matmuls", "official", "official-compiled", "megatron", "megatron-native"),
    *("transformer-engine", "liger", "liger-scaled", "trl", "cut-cross-entropy", "verl"),
)


@dataclass(frozen=True)
class Configuration:
    """One problem size.

    Attributes:
        vocab: Vocabulary over all ranks.
        hidden: H.
        tokens: N.
        prompt: Share of the tokens without a label.
        dropped: Share of the labelled tokens that ProFit drops.
        dtype: A name from `DTYPES`.
        tp: Tensor-parallel ranks that the vocabulary is split over.
    """

    vocab: int
    hidden: int
    tokens: int
    prompt: float
    dropped: float
    dtype: str
    tp: int

    def __str__(self) -> str:
        return (
            f"V {self.vocab:,}, H {self.hidden:,}, N {self.tokens:,}, {self.prompt:.0%} prompt, "
            f"{self.dropped:.0%} dropped, {self.dtype}, TP {self.tp}"
        )


@dataclass(frozen=True)
class Problem:
    """The tensors of a configuration on one rank.

    Kept tokens have the row's most probable label and dropped ones its least probable. So p >= 1/V for
    kept tokens and p <= 1/V for dropped ones. Then tau = 1/V drops exactly the wanted share, however
    logits are rounded.
    """

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N], -100 in prompts
    kept: Tensor  # [N] bool
    tau: float
    group: dist.ProcessGroup

    @classmethod
    def of(cls, config: Configuration, device: torch.device) -> Problem:
        """Make the tensors of a configuration; the same seed on every rank."""
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            tensor = torch.empty(shape, dtype=DTYPES[config.dtype], device=device)
            return tensor.normal_(generator=generator)

        hidden = random(config.tokens, config.hidden)
        weight = random(config.vocab, config.hidden).mul_(config.hidden**-0.5)
        order = torch.randperm(config.tokens, generator=generator, device=device)
        supervised = order[round(config.tokens * config.prompt) :]
        labels = torch.full((config.tokens,), -100, device=device)
        kept = torch.zeros(config.tokens, dtype=torch.bool, device=device)
        kept[supervised[round(len(supervised) * config.dropped) :]] = True
        for rows in supervised.split(256):
            logits = hidden[rows] @ weight.t()
            labels[rows] = torch.where(kept[rows], logits.argmax(1), logits.argmin(1))
        group = dist.group.WORLD
        assert group is not None, "init_process_group comes first"
        shard = weight.chunk(config.tp)[dist.get_rank()].clone()
        return cls(
            hidden.requires_grad_(),
            shard.requires_grad_(),
            labels,
            kept,
            1 / config.vocab,
            group,
        )

    @property
    def supervised(self) -> Tensor:
        return self.labels != -100

    @property
    def targets(self) -> Tensor:
        """[N] labels that any lookup accepts, for computations that know no ignored label."""
        return self.labels.clamp(min=0)

    @property
    def parallel_group(self) -> dist.ProcessGroup | None:
        return self.group if self.group.size() > 1 else None


Step = Callable[[Problem], Tensor | None]  # the loss to propagate back, or None when all is done


class Absent(Exception):
    """A computation that cannot run here; the message is the reason."""


def ours(**options: Any) -> Step:
    """Return a step of this project's objective, with options of `linear_objective`."""

    def step(problem: Problem) -> Tensor:
        objective = build_objective(
            "profit", prob_threshold=problem.tau, threshold_direction="higher"
        )
        output = linear_objective(
            problem.hidden,
            problem.weight,
            problem.labels,
            objective,
            group=problem.parallel_group,
            **options,
        )
        return output.loss.sum() / problem.supervised.sum()

    return step


def matmuls(problem: Problem) -> None:
    """Compute the three matrix products alone.

    These are the logits of the supervised rows, and both gradients of the kept rows.
    """
    with torch.no_grad():
        logits = problem.hidden[problem.supervised] @ problem.weight.t()
        kept_hidden = problem.hidden[problem.kept]
        grad_logits = logits[: len(kept_hidden)]
        _grad_hidden = grad_logits @ problem.weight
        _grad_weight = grad_logits.t() @ kept_hidden


def official(hidden: Tensor, weight: Tensor, labels: Tensor, tau: float) -> Tensor:
    """Compute ProFit as its released code does: fp32 logits, a softmax for p, then a cross-entropy."""
    logits = functional.linear(hidden, weight).float()
    with torch.no_grad():
        p = logits.softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        supervised = labels != -100
        mask = supervised & (p >= tau)
    loss = functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    return (loss * mask).sum() / supervised.sum()


def one_process(function: Callable[..., Tensor]) -> Step:
    """Return a step of a function that knows no tensor parallelism."""

    def step(problem: Problem) -> Tensor:
        return function(problem.hidden, problem.weight, problem.labels, problem.tau)

    return step


def masked_afterwards(token_loss: Callable[[Problem], Tensor]) -> Step:
    """Return a step of ProFit on a cross-entropy that knows no objective: each token's loss gives its p."""

    def step(problem: Problem) -> Tensor:
        loss = token_loss(problem)
        kept = problem.supervised & (loss.detach().float().neg().exp() >= problem.tau)
        return (loss * kept).sum() / problem.supervised.sum()

    return step


def replicated(problem: Problem) -> Tensor:
    """Return hidden states [N, H] whose gradient is summed over the ranks, as in Megatron's output layer."""
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    return copy_to_tensor_model_parallel_region(problem.hidden, group=problem.group)


def megatron(name: str) -> Callable[[Problem], Tensor]:
    """Return Megatron's cross-entropy on sharded logits.

    "native" is --cross-entropy-fusion-impl native.
    """
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    def token_loss(problem: Problem) -> Tensor:
        logits = functional.linear(replicated(problem), problem.weight)
        if name == "native":
            return fused_vocab_parallel_cross_entropy(logits, problem.targets, problem.group)
        return vocab_parallel_cross_entropy(logits, problem.targets, tp_group=problem.group)

    return token_loss


def liger() -> Callable[[Problem], Tensor]:
    """Return Liger's fused linear cross-entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def token_loss(problem: Problem) -> Tensor:
        return liger_fused_linear_cross_entropy(
            problem.hidden, problem.weight, problem.labels, reduction="none"
        )

    return token_loss


def liger_scaled() -> Callable[[Problem], Tensor]:
    """Return Liger's fused linear scaled cross-entropy, which gives the loss of each token."""
    from liger_kernel.ops import (
        LigerFusedLinearScaledCrossEntropyFunction,
        LigerFusedLinearScaledCrossEntropyTPFunction,
    )

    def token_loss(problem: Problem) -> Tensor:
        inputs = problem.hidden, problem.weight, problem.labels
        if problem.parallel_group is None:
            return LigerFusedLinearScaledCrossEntropyFunction.apply(*inputs)
        return LigerFusedLinearScaledCrossEntropyTPFunction.apply(*inputs, problem.group)

    return token_loss


def transformer_engine() -> Callable[[Problem], Tensor]:
    """Return Transformer Engine's parallel cross-entropy on sharded logits."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    def token_loss(problem: Problem) -> Tensor:
        logits = functional.linear(replicated(problem), problem.weight)
        # Shapes [1, N, V] and [1, N]; no label smoothing, the loss of each token.
        loss = parallel_cross_entropy(
            logits[None], problem.targets[None], 0.0, False, problem.parallel_group
        )
        return loss.view(-1)

    return token_loss


def trl() -> Callable[[Problem], Tensor]:
    """Return the log-probabilities in chunks of TRL's trainers, which leave out rows without a label."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def token_loss(problem: Problem) -> Tensor:
        rows = problem.supervised.nonzero()[:, 0]
        log_probs, *_ = ChunkedLogProbFunction.apply(
            *(problem.hidden[rows], problem.weight, None, problem.labels[rows]),
            *(1.0, TRL_TILE, None, 1.0, ()),
        )
        return log_probs.new_zeros(len(problem.labels)).index_put((rows,), -log_probs)

    return token_loss


def cut_cross_entropy() -> Callable[[Problem], Tensor]:
    """Return the Cut Cross-Entropy of its package."""
    from cut_cross_entropy import VocabParallelOptions, linear_cross_entropy

    def token_loss(problem: Problem) -> Tensor:
        rows, rank = problem.weight.size(0), problem.group.rank()
        split = VocabParallelOptions(rank * rows, (rank + 1) * rows, problem.parallel_group)
        return linear_cross_entropy(
            problem.hidden,
            problem.weight,
            problem.labels,
            reduction="none",
            vocab_parallel_options=None if problem.parallel_group is None else split,
        )

    return token_loss


def verl(repository: Path | None) -> Callable[[Problem], Tensor]:
    """Return verl's kernel from a checkout, without the imports of its package (Ray and more)."""
    if repository is None:
        raise Absent("no checkout given (--verl DIR)")
    for name in ("verl", "verl.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(repository.joinpath(*name.split(".")))]
        sys.modules.setdefault(name, package)
    kernel = importlib.import_module("verl.utils.kernel.linear_cross_entropy")

    def token_loss(problem: Problem) -> Tensor:
        log_prob, _ = kernel.linear_cross_entropy(
            replicated(problem),
            problem.weight,
            problem.targets,
            1.0,
            "none",
            problem.parallel_group,
        )
        return -log_prob

    return token_loss


def computations(
    options: argparse.Namespace, device: torch.device, tp: int
) -> dict[str, Step | Absent]:
    """Return all computations by name; for one that cannot run here, the reason."""

    def single(make: Callable[[], Step]) -> Step:
        if tp > 1:
            raise Absent("knows no tensor parallelism")
        return make()

    def on_gpu(make: Callable[[], Callable[[Problem], Tensor]]) -> Step:
        if device.type != "cuda":
            raise Absent("needs a GPU")
        return masked_afterwards(make())

    builders: dict[str, Callable[[], Step]] = {
        **{
            name: functools.partial(ours, **given)
            for name, given in ours_variants(options.ours).items()
        },
        "matmuls": lambda: matmuls,
        "official": lambda: single(lambda: one_process(official)),
        "official-compiled": lambda: single(
            lambda: one_process(torch.compile(official, dynamic=False))
        ),
        "megatron": lambda: masked_afterwards(megatron("unfused")),
        "megatron-native": lambda: masked_afterwards(megatron("native")),
        "transformer-engine": lambda: on_gpu(transformer_engine),
        "liger": lambda: single(lambda: on_gpu(liger)),
        "liger-scaled": lambda: masked_afterwards(liger_scaled()),
        "trl": lambda: single(lambda: masked_afterwards(trl())),
        "cut-cross-entropy": lambda: on_gpu(cut_cross_entropy),
        "verl": lambda: on_gpu(lambda: verl(options.verl)),
    }
    return {
        name: _built(build)
        for name, build in builders.items()
        if not options.only or name in options.only or name.startswith("ours ")
    }


def _built(build: Callable[[], Step]) -> Step | Absent:
    try:
        return build()
    except Absent as absent:
        return absent
    except ImportError as error:
        return Absent(f"not installed ({error})")


def ours_variants(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parse names and keyword arguments of `linear_objective`.

    For example, they come from "chunk_vocab=4096,extra_statistics=rank+lower_mass".
    """
    known = inspect.signature(linear_objective).parameters
    variants: dict[str, dict[str, Any]] = {"ours": {}}
    for text in given:
        options: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            if name not in known:
                raise SystemExit(f"--ours {text}: linear_objective takes no {name!r}")
            options[name] = int(value) if value.isdigit() else value
            if name == "extra_statistics":
                options[name] = frozenset(value.split("+"))
        variants[f"ours {text}"] = options
    return variants


def run_configuration(
    options: argparse.Namespace, config: Configuration, device: torch.device
) -> dict[str, Any]:
    """Return results by name: seconds, peak bytes and gradient difference, or why there are none."""
    torch._dynamo.reset()
    problem = Problem.of(config, device)
    results: dict[str, Any] = {}
    ready: dict[str, Callable[[], None]] = {}
    reference: tuple[Tensor, Tensor] | None = None
    steps = computations(options, device, config.tp)
    # The first of these that knows the objective judges the gradients of the others.
    for name in sorted(steps, key=lambda n: (n != "official", n != "megatron")):
        step = steps[name]
        try:
            if isinstance(step, Absent):
                raise step
            gradients = _first_run(step, problem)
        except Exception as error:
            if name.startswith("ours"):
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            results[name] = {"absent": reason[0]}
            _clear(problem)
            continue
        reference = reference or gradients
        difference = _difference(gradients, reference) if gradients and reference else None
        results[name] = {"gradient_difference": difference}
        ready[name] = _repeatable(step, problem)
        del gradients
    del reference
    in_order = {name: ready[name] for name in steps if name in ready}
    clock = time.process_time if options.cpu_time else time.perf_counter
    measurements = benchmarking.interleaved(in_order, options.rounds, device, clock)
    for name, measurement in measurements.items():
        results[name] |= {**asdict(measurement), "median": measurement.median}
    gradient_bytes = sum(
        tensor.numel() * tensor.element_size() for tensor in (problem.hidden, problem.weight)
    )
    return {
        **asdict(config),
        "gradient_bytes": gradient_bytes,
        "results": {name: results[name] for name in steps},
    }


def _first_run(step: Step, problem: Problem) -> tuple[Tensor, Tensor] | None:
    """Run a step once, which also compiles and tunes, and return the gradients that it leaves."""
    _repeatable(step, problem, clear=False)()
    hidden, weight = problem.hidden.grad, problem.weight.grad
    _clear(problem)
    return None if hidden is None or weight is None else (hidden, weight)


def _repeatable(step: Step, problem: Problem, clear: bool = True) -> Callable[[], None]:
    def run() -> None:
        loss = step(problem)
        if loss is not None:
            loss.backward()
        if clear:
            _clear(problem)

    return run


def _clear(problem: Problem) -> None:
    problem.hidden.grad = problem.weight.grad = None


def _difference(gradients: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> float:
    """Return the norm of the difference to the reference over the reference's norm, the larger of the two."""

    def norm(tensor: Tensor) -> Tensor:
        return torch.linalg.vector_norm(tensor, dtype=torch.float32)

    return max(
        float(norm(ours - theirs) / norm(theirs))
        for ours, theirs in zip(gradients, reference, strict=True)
    )


def run_rank(
    rank: int, world: int, options: argparse.Namespace, config: Configuration, out: str
) -> None:
    """Run a configuration on one of its tensor-parallel ranks."""
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, options.threads // world))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{out}.rendezvous",
        rank=rank,
        world_size=world,
    )
    record = run_configuration(options, config, device)
    if rank == 0:
        print(f"\n{config}\n{table(record)}", flush=True)
        torch.save((benchmarking.environment(device, PEER_PACKAGES), record), out)
    end_communication()


def table(record: dict[str, Any]) -> str:
    """Return a configuration as Markdown."""
    results, ours_median = record["results"], record["results"].get("ours", {}).get("median")
    rows = []
    for name, result in results.items():
        if "absent" in result:
            rows.append([name, f"absent: {result['absent']}"[:90], *[""] * 5])
            continue
        peak, difference = result["peak_bytes"], result["gradient_difference"]
        beyond = max(0, peak - record["gradient_bytes"])
        rows.append(
            [
                name,
                f"{1e3 * result['median']:,.1f}",
                f"{1e3 * min(result['seconds']):,.1f} to {1e3 * max(result['seconds']):,.1f}",
                f"{result['median'] / ours_median:.2f}" if ours_median else "",
                f"{peak / benchmarking.MIB:,.0f}",
                f"{beyond / benchmarking.MIB:,.0f}",
                "" if difference is None else f"{difference:.1e}",
            ]
        )
    header = ["", "median ms", "range ms", "x ours", "peak MiB", "without gradients"]
    return benchmarking.markdown_table([*header, "gradient difference"], rows)


EXPLANATION = """\
Forward plus backward, medians over {rounds} rounds; in each round every computation runs once. `x ours`: time
over that of `ours`. Peak: memory beyond the inputs; `without gradients`: also without the gradients of hidden
states and weight, which all have to return. `gradient difference`: relative, to `official`, or to `megatron`
where that is absent. `matmuls`: the three matrix products alone, on the rows that need them.
`ours` chooses what to keep for the backward pass, `recompute` keeps no logits.
`official`: ProFit as its released code computes it. `megatron`, `megatron-native`: output layer, Megatron's
vocab_parallel_cross_entropy or its fused native one, mask afterwards. `transformer-engine`, `liger`,
`liger-scaled`, `trl`, `cut-cross-entropy`, `verl`: their losses of each token, mask afterwards. {memory}
"""
MEMORY = {
    "cuda": "Memory: the most that torch's allocator had allocated.",
    "cpu": "Memory: the high-water mark of the process, which includes what operators allocate inside.",
}


def configurations(options: argparse.Namespace) -> Iterator[Configuration]:
    """Yield every combination of the sizes that are asked for."""
    for vocab, hidden, tokens, (prompt, dropped), dtype, tp in itertools.product(
        *(getattr(options, name) for name in ("vocab", "hidden", "tokens", "masks", "dtype", "tp"))
    ):
        yield Configuration(vocab, hidden, tokens, prompt, dropped, dtype, tp)


def shares(text: str) -> tuple[float, float]:
    """Parse PROMPT/DROPPED of the command line, for example 0.5/0.2."""
    prompt, dropped = (float(share) for share in text.split("/"))
    if not (0 <= prompt < 1 and 0 <= dropped < 1):
        raise argparse.ArgumentTypeError(f"{text} has a share that is not in [0, 1)")
    return prompt, dropped


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    selection = parser.add_mutually_exclusive_group()
    for preset, text in (
        ("quick", "two sizes for 2 CPU cores"),
        ("full", "the whole grid, for GPUs"),
    ):
        help = f"{text}; other flags replace its parts"
        selection.add_argument(
            f"--{preset}", dest="preset", action="store_const", const=preset, help=help
        )
    grid = parser.add_argument_group(
        "what is measured: all combinations", argument_default=argparse.SUPPRESS
    )
    for name in ("vocab", "hidden", "tokens", "tp"):
        grid.add_argument(f"--{name}", type=int, nargs="+")
    grid.add_argument(
        "--masks",
        type=shares,
        nargs="+",
        metavar="PROMPT/DROPPED",
        help="share of the tokens without a label, and of the others that ProFit drops: 0.5/0.2",
    )
    grid.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        help="bf16, or fp32 on a CPU that computes bf16 slowly",
    )
    grid.add_argument("--ours", action="append", metavar="NAME=VALUE,…", help="a variant of ours")
    grid.add_argument("--rounds", type=int)
    parser.add_argument("--only", nargs="+", choices=NAMES, help="besides the --ours variants")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--cpu-time", action="store_true", help="of the process: for a CPU that other work shares"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--verl", type=Path, metavar="DIR", help="a checkout of verl")
    parser.add_argument("--out", type=Path, default=benchmarking.RESULTS)
    parser.add_argument("--name", default="objective", help="of the results files")
    given = vars(parser.parse_args(argv))
    options = argparse.Namespace(**DEFAULTS | PRESETS[given["preset"]] | given)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "dtype" not in options:
        options.dtype = [benchmarking.fast_dtype(options.device)]
    ours_variants(options.ours)
    _check_tp(parser, options)
    return options


def _check_tp(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    gpus = torch.cuda.device_count() if options.device == "cuda" else None
    for tp in options.tp:
        if tp < 1 or (gpus is not None and tp > gpus):
            parser.error(
                f"--tp {tp}: there are {gpus} GPUs; give 1 or more, and no more than these"
            )
        for vocab in options.vocab:
            if vocab % tp:
                parser.error(f"--vocab {vocab} cannot be split evenly over --tp {tp}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all configurations, and write the results after each."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse_arguments(argv)
    command = shlex.join(["python", "benchmarks/bench_objective.py", *argv])
    records: list[dict[str, Any]] = []
    body = EXPLANATION.format(rounds=options.rounds, memory=MEMORY[options.device])
    for config in configurations(options):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "record")
            mp.spawn(run_rank, args=(config.tp, options, config, out), nprocs=config.tp)
            environment, measured = torch.load(out)
        records.append(measured)
        body += f"\n## {config}\n\n{table(measured)}"
        record = {
            "environment": environment
            | {"threads": options.threads, "seconds": "of CPU" if options.cpu_time else "elapsed"},
            "command": command,
            "configurations": records,
        }
        page = benchmarking.write_results(
            options.out,
            f"{options.name}-{options.device}",
            record,
            "Output layer with ProFit",
            body,
        )
    print(f"results: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
