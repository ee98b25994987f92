"""Training runs of a proof: a model of a wanted shape, chats of random words, and one run in this process."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "tools"))

from make_tiny_model import TinyShape, make_tiny_model

# Steps at the start of a run in which memory is mapped, kernels are compiled and plans are made.
WARM_UP = 3


@dataclass(frozen=True)
class Sizes:
    """The sizes of the steps on a device.

    Attributes:
        model: Shape of the model that trains in full.
        lora: Shape of the model that trains with adapters.
        seq_length: Tokens of a row.
        rows: Of a micro-batch; a step has two micro-batches.
        steps: Of a run.
        timed: Counted steps of a run that is timed.
        operation: Rows, hidden size and vocabulary of the check of the operation.
        kernel: Flags of the kernel's table.
    """

    model: TinyShape
    lora: TinyShape
    seq_length: int
    rows: int
    steps: int
    timed: int
    operation: tuple[int, int, int]
    kernel: tuple[str, ...]


# Qwen3-0.6B and Qwen3-8B, from their published config.json.
_QWEN3_06B = TinyShape(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    initializer_range=0.02,
)
_QWEN3_8B = replace(
    _QWEN3_06B,
    hidden_size=4096,
    intermediate_size=12288,
    num_layers=36,
    num_attention_heads=32,
    tied=False,
)
SIZES = {
    "cuda": Sizes(
        model=_QWEN3_06B,
        lora=_QWEN3_8B,
        seq_length=4096,
        rows=2,
        steps=20,
        timed=8,
        operation=(2048, 1024, 151936),
        kernel=(
            *("--hidden", "1024", "5120", "--tokens", "8192", "--masks", "0.5/0.2", "0/0"),
            *("--vocab", "151936", "248320", "--ours", "backward=recompute", "--rounds", "10"),
        ),
    ),
    "cpu": Sizes(
        model=TinyShape(),
        lora=TinyShape(),
        seq_length=128,
        rows=2,
        steps=4,
        timed=2,
        operation=(96, 64, 1000),
        kernel=(
            *("--hidden", "64", "--tokens", "64", "--masks", "0.5/0.2", "--vocab", "1000"),
            *("--rounds", "1", "--only", "ours", "matmuls", "official"),
        ),
    ),
}


def write_model(folder: Path, shape: TinyShape, with_weights: bool) -> Path:
    """Write a HuggingFace folder of a shape: config, tokenizer, and random weights in bf16 if wanted."""
    texts = sorted((REPOSITORY / "examples" / "data").glob("*.jsonl"))
    # The tokenizer's folder is that of a tiny model; the vocabulary's other rows are random too.
    make_tiny_model(folder, texts, TinyShape(), overwrite=True)
    config = json.loads((folder / "config.json").read_text())
    given = {name: value for name, value in asdict(shape).items() if name in config}
    config |= given | {
        "num_hidden_layers": shape.num_layers,
        "tie_word_embeddings": shape.tied,
        "layer_types": None,
        "max_window_layers": shape.num_layers,
        "max_position_embeddings": 40960,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    if with_weights:
        _write_weights(folder)
    return folder


def _write_weights(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        )
    weights = folder.with_name(folder.name + "-weights")
    model.save_pretrained(weights)
    for file in weights.glob("model*"):
        file.replace(folder / file.name)
    shutil.rmtree(weights)


def write_chats(path: Path, tokenizer_folder: Path, lengths: Sequence[tuple[int, int]]) -> Path:
    """Write chats of random words; each has about as many tokens of prompt and of answer as are given."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.tensor(
        [i for i in range(256, len(tokenizer)) if i not in tokenizer.all_special_ids]
    )

    def text(length: int) -> str:
        chosen = torch.randint(len(ordinary), (length,), generator=generator)
        return tokenizer.decode(ordinary[chosen])

    with path.open("w") as file:
        for prompt, answer in lengths:
            messages = [
                {"role": "user", "content": text(prompt)},
                {"role": "assistant", "content": text(answer)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def uneven(seq_length: int, count: int) -> list[tuple[int, int]]:
    """Return lengths of prompts and answers that pack into rows of `seq_length`, the same in each call."""
    generator = torch.Generator().manual_seed(1)
    shares = torch.rand(count, 2, generator=generator) * 0.3 + 0.02
    return [(int(a * seq_length), int(b * seq_length)) for a, b in shares.tolist()]


def train(flags: Sequence[str], loss: str = "ours") -> list[dict[str, Any]]:
    """Train in this process, which can do so once, and return the lines of its metrics file.

    Args:
        flags: Of the entry, `--device` and `--metrics-file` among them.
        loss: "ours", or a loss of the benchmark of a training step.
    """
    from megatron_profit.sft import start

    device = start(flags)
    from megatron_profit.training import main

    if loss != "ours":
        from bench_training_step import PeerLoss

        make_forward_step = main.make_forward_step
        vars(main)["make_forward_step"] = lambda _: make_forward_step(
            lambda batch: PeerLoss(loss, batch.labels)
        )
    main.main(flags, device)
    path = Path(flags[list(flags).index("--metrics-file") + 1])
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the lines of training steps."""
    return [line for line in lines if line["kind"] == "train"]


def speed(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return medians over the steps after the first ones, and the peak of memory."""
    steps = steps_of(lines)
    counted = steps[WARM_UP:] if len(steps) > WARM_UP else steps[-1:]
    medians = {
        name: median(step[name] for step in counted)
        for name in ("seconds per step", "tokens per second", "model TFLOP/s per GPU")
    }
    return medians | {
        "peak memory GiB": max(step["peak memory GiB"] for step in steps),
        "kept fraction": median(step.get("kept fraction", 1.0) for step in counted),
    }
