"""Measure training on packed rows against Megatron's stock SFT: supervised tokens a second on the same files.

    python benchmarks/bench_packing.py --megatron-lm DIR --tokenizer DIR --data FILE…

Each file has three runs, which take turns. Each is a real run on the CPU in a process of its own:

1. Megatron-LM's pretrain_gpt.py with --sft, which pads every record to a row;
2. this project's entry with a record to a row;
3. this project's entry with --packing.

The second run saves time over the first by computing logits of supervised tokens only. The third saves
time over the second by packing. The result is rewritten after each round of a file, so an
interrupted run has one too.

Rows are as long as the longest record needs, rounded up to a power of two, so that no record loses its
end. Longer rows (--seq-length) favour packing; shorter ones cut records.

Stock SFT needs Transformer Engine for its attention, which is not available on a CPU. It gets the same
kernel as the other runs, with one call for each of its sequences. A record counts the same number of
supervised tokens in all runs: the assistant's. Stock SFT trains the prompt too, which is not counted in
its favour.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

from benchmarking import RESULTS, environment, markdown_table, write_results

REPOSITORY = Path(__file__).resolve().parents[1]
# Steps of each run that are not counted: memory is touched, kernels are chosen.
WARM_UP = 1
STOCK, UNPACKED, PACKED = "stock --sft", "ours, a record to a row", "ours, --packing"


@dataclass(frozen=True)
class Shape:
    """The model, a Qwen3 with the tokenizer's real vocabulary."""

    hidden_size: int
    num_layers: int
    vocab_size: ClassVar[int] = 151936
    head_dim: ClassVar[int] = 64

    def config(self) -> dict:
        """Return HuggingFace's config.json."""
        heads = self.hidden_size // self.head_dim
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": 3 * self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "initializer_range": 0.02,
        }


@dataclass(frozen=True)
class Run:
    """The measurements of a run.

    Attributes:
        seconds: Of each counted step of all rounds.
        tokens_per_step: Supervised tokens. With packed rows, the counted steps' tokens; else, where a
            step holds a few records, the mean of the file's records.
    """

    seconds: tuple[float, ...]
    tokens_per_step: float

    @property
    def seconds_per_step(self) -> float:
        return mean(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.seconds_per_step


@dataclass(frozen=True)
class Job:
    """A file to be measured.

    Attributes:
        commands: Name of a run -> its command, without the seed.
        about: The content of the file, and how it is put into rows.
        logs: Name of a run -> its output in each round.
    """

    commands: dict[str, list[object]]
    about: dict[str, Any]
    logs: dict[str, list[str]]


def main() -> None:
    """Measure all files, and write the results after each round."""
    options = _parser().parse_args()
    shape = Shape(options.hidden_size, options.layers)
    import torch

    record: dict = {
        "command": "python benchmarks/bench_packing.py --megatron-lm DIR --tokenizer DIR --data FILE… "
        + (f"--seq-length {options.seq_length} " if options.seq_length else "")
        + f"--rows {options.rows} --steps {options.steps} --rounds {options.rounds} "
        f"--hidden-size {options.hidden_size} --layers {options.layers}",
        # The load of the machine before anything was measured.
        "environment": environment(torch.device("cpu"), ("transformers",))
        | {"Megatron-LM": _megatron_version(options.megatron_lm)},
        "shape": asdict(shape),
    }
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        shutil.copytree(options.tokenizer, model)
        (model / "config.json").write_text(json.dumps(shape.config()))
        jobs = {data.name: job(options, shape, model, data, Path(folder)) for data in options.data}
        record["files"] = {}
        for seed in range(1, options.rounds + 1):
            for name, each in jobs.items():
                for run, command in each.commands.items():
                    print(f"round {seed} of {options.rounds}: {name}, {run}", file=sys.stderr)
                    each.logs[run].append(_run([*command, "--seed", seed]))
                record["files"][name] = results(each, options)
                page = write_results(
                    options.out, "packing", record, _title(shape), _table(record["files"])
                )
    print(page.read_text())


def job(options: argparse.Namespace, shape: Shape, model: Path, data: Path, folder: Path) -> Job:
    """Return the three runs of a file."""
    from transformers import AutoTokenizer

    from megatron_profit.data import ChatRenderer, build_examples, normalise, read_records

    renderer = ChatRenderer(AutoTokenizer.from_pretrained(model))
    messages = folder / f"{data.stem}.jsonl"
    with messages.open("w", encoding="utf-8") as lines:
        for raw in read_records(data):
            lines.write(json.dumps({"messages": list(normalise(raw).messages)}) + "\n")
    _, report = build_examples(data, renderer, shape.config()["max_position_embeddings"])
    seq_length = options.seq_length or 1 << (report.longest - 2).bit_length()
    _, report = build_examples(data, renderer, seq_length)
    about = {
        "records": report.kept,
        "seq_length": seq_length,
        "records that lost their end": report.truncated,
        "tokens of a record": report.total_tokens / report.kept,
        "supervised tokens of a record": report.supervised_tokens / report.kept,
    }
    common: list[object] = [
        *("--seq-length", seq_length, "--micro-batch-size", 1),
        *("--global-batch-size", options.rows, "--train-iters", WARM_UP + options.steps),
        *("--lr", 1e-5, "--eval-iters", 0, "--log-interval", 1, "--optimizer", "sgd"),
        *("--calculate-per-token-loss",),
    ]
    ours: list[object] = ["-m", "megatron_profit.sft", "--device", "cpu", "--hf-model", model]
    ours += ["--random-init", "--data", data, "--data-cache", folder / "cache"]
    ours += ["--objective", "sft", *common]
    stock = [__file__, "--stock", options.megatron_lm, *_stock_flags(shape, model), *common]
    commands = {
        STOCK: [*stock, "--data-path", messages],
        UNPACKED: [*ours, "--no-packing"],
        PACKED: [*ours, "--packing"],
    }
    return Job(commands, about, {name: [] for name in commands})


def results(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Return the measurements of the rounds so far."""
    average = job.about["supervised tokens of a record"] * options.rows
    steps = WARM_UP + options.steps
    runs = {
        name: _read(logs, steps, None if name == PACKED else average)
        for name, logs in job.logs.items()
    }
    return {
        **job.about,
        "rounds": len(job.logs[PACKED]),
        "runs": {
            name: {
                **asdict(run),
                "seconds_per_step": run.seconds_per_step,
                "tokens_per_second": run.tokens_per_second,
            }
            for name, run in runs.items()
        },
    }


def _megatron_version(checkout: Path) -> str:
    text = (checkout / "megatron" / "core" / "package_info.py").read_text()
    return ".".join(re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", text, re.MULTILINE))


def _stock_flags(shape: Shape, model: Path) -> list:
    config = shape.config()
    return [
        *("--sft", "--tokenizer-type", "SFTTokenizer", "--tokenizer-model", model),
        *("--sft-tokenizer-prompt-format", "default", "--split", "100,0,0"),
        *("--num-layers", shape.num_layers, "--hidden-size", shape.hidden_size),
        *("--ffn-hidden-size", config["intermediate_size"], "--kv-channels", shape.head_dim),
        *("--num-attention-heads", config["num_attention_heads"], "--group-query-attention"),
        *("--num-query-groups", config["num_key_value_heads"], "--qk-layernorm", "--swiglu"),
        *("--normalization", "RMSNorm", "--norm-epsilon", 1e-6, "--disable-bias-linear"),
        *("--position-embedding-type", "rope", "--rotary-base", 1000000),
        *("--attention-dropout", 0, "--hidden-dropout", 0, "--max-position-embeddings", 40960),
        *("--make-vocab-size-divisible-by", shape.vocab_size, "--transformer-impl", "local"),
        *("--distributed-backend", "gloo", "--no-gradient-accumulation-fusion"),
        *("--no-persist-layer-norm", "--no-masked-softmax-fusion", "--no-bias-swiglu-fusion"),
        *("--no-bias-dropout-fusion", "--no-rope-fusion", "--num-workers", 0),
        *("--dataloader-type", "single", "--no-create-attention-mask-in-dataloader"),
        *("--eval-interval", 1000),
    ]


def _run(command: Sequence[object]) -> str:
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{result.stdout[-6000:]}")
    return result.stdout


def _read(logs: Sequence[str], steps: int, tokens_per_step: float | None) -> Run:
    """Read the steps of all rounds from their logs; their tokens too, unless they are given."""
    seconds: list[float] = []
    tokens: list[float] = []
    for log in logs:
        found = re.findall(r"elapsed time per iteration \(ms\): +(\S+) \|", log)
        if len(found) != steps:
            sys.exit(f"{len(found)} of {steps} steps were logged:\n{log[-6000:]}")
        seconds += [float(value) / 1000 for value in found[WARM_UP:]]
        counts = re.findall(r"\| supervised tokens: +(\S+) \|", log)
        tokens += [float(count) for count in counts[WARM_UP:]]
    return Run(tuple(seconds), tokens_per_step or mean(tokens))


def _title(shape: Shape) -> str:
    return (
        f"Training on packed rows: Qwen3 with {shape.num_layers} layers of {shape.hidden_size} "
        f"and {shape.vocab_size:,} tokens, fp32"
    )


def _table(files: dict) -> str:
    header = ["file and row", "run", "s a step", "supervised tokens a step", "a second", "of stock"]
    rows = []
    for name, file in files.items():
        stock = file["runs"][STOCK]["tokens_per_second"]
        rows += [
            [
                f"{name}, {file['tokens of a record']:.0f} tokens a record, rows of {file['seq_length']:,}",
                run,
                f"{values['seconds_per_step']:.2f}",
                f"{values['tokens_per_step']:.0f}",
                f"{values['tokens_per_second']:.1f}",
                f"{values['tokens_per_second'] / stock:.1f}x",
            ]
            for run, values in file["runs"].items()
        ]
    return markdown_table(header, rows)


def run_stock(checkout: str, flags: list[str]) -> None:
    """Run Megatron-LM's pretrain_gpt.py as it is, on the CPU backend and with an attention for CPUs."""
    from megatron_profit.megatron_patches import activate

    activate("cpu")
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29731")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    import torch
    from megatron.core.enums import ModelType
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_profit.models.attention import ScaledDotProductAttention
    from megatron_profit.models.layer_specs import layer_spec

    class ThdAttention(ScaledDotProductAttention):
        def forward(  # type: ignore[override]  # the arguments that Megatron gives here
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            *args: Any,
            packed_seq_params: PackedSeqParams,
            **kwargs: Any,
        ) -> torch.Tensor:
            bounds = packed_seq_params.cu_seqlens_q.tolist()
            attend = super().forward
            contexts = [
                attend(*(t[begin:end, None] for t in (query, key, value)))
                for begin, end in pairwise(bounds)
            ]
            return torch.cat(contexts)

    def spec(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
        block = layer_spec(config, vp_stage)
        assert isinstance(block, TransformerBlockSubmodules)
        for layer in block.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = ThdAttention
        return block

    sys.argv = ["pretrain_gpt.py", *flags]
    sys.path.append(checkout)
    import pretrain_gpt

    provider = pretrain_gpt.train_valid_test_datasets_provider
    provider.is_distributed = True
    args = parse_and_validate_args()
    config = gpt_config_from_args(args)
    config.transformer_layer_spec = spec
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        provider,
        ModelType.encoder_or_decoder,
        pretrain_gpt.forward_step,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megatron-lm", type=Path, required=True, help="a Megatron-LM checkout")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a Qwen3 tokenizer's folder")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="chat files")
    parser.add_argument("--seq-length", type=int, help="by default what the longest record needs")
    parser.add_argument("--rows", type=int, default=1, help="of a step")
    parser.add_argument("--steps", type=int, default=4, help="of a run that are counted")
    parser.add_argument("--rounds", type=int, default=3, help="of the three runs, in turn")
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stock"]:
        run_stock(sys.argv[2], sys.argv[3:])
    else:
        main()
