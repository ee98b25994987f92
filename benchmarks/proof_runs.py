"""Training runs of a proof: their sizes on each device, and one run in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_training_step import begin_with
from training_inputs import QWEN3_06B, QWEN3_8B

# Steps at the start of a run in which memory is mapped, kernels are compiled and plans are made.
WARM_UP = 3


@dataclass(frozen=True)
class Sizes:
    """The sizes of the steps on a device.

    Attributes:
        model: Entries of config.json of the model that trains in full; none for the tiny model's own.
        lora: The same of the model that trains with adapters.
        seq_length: Tokens of a row.
        rows: Of a micro-batch; a step has two micro-batches.
        steps: Of a run.
        timed: Counted steps of a run that is timed.
        operation: Rows, hidden size and vocabulary of the check of the operation.
        kernel: Flags of the parts of the kernel's table.
    """

    model: Mapping[str, Any]
    lora: Mapping[str, Any]
    seq_length: int
    rows: int
    steps: int
    timed: int
    operation: tuple[int, int, int]
    kernel: tuple[tuple[str, ...], ...]


# The deviation of published models; the tiny model has a larger one.
_WEIGHTS = {"initializer_range": 0.02}
SIZES = {
    "cuda": Sizes(
        model=QWEN3_06B | _WEIGHTS,
        lora=QWEN3_8B | _WEIGHTS,
        seq_length=4096,
        rows=2,
        steps=20,
        timed=8,
        operation=(2048, 1024, 151936),
        kernel=(
            (
                *("--hidden", "1024", "5120", "--tokens", "8192", "--masks", "0.5/0.2", "0/0"),
                *("--ours", "backward=recompute", "--rounds", "10"),
                # By default a block has 16,384 entries at 4,096 supervised tokens, 8,192 at 8,192.
                *("--ours", "chunk_vocab=4096", "--ours", "chunk_vocab=32768"),
                *("--ours", "chunk_vocab=65536"),
            ),
            # The size of published figures.
            (
                *("--hidden", "2048", "--tokens", "16384", "--masks", "0/0", "--vocab", "248320"),
                *("--ours", "backward=recompute", "--rounds", "5"),
            ),
            # A long row on one of four tensor-parallel ranks: a quarter of that vocabulary.
            (
                *("--hidden", "2048", "--tokens", "262144", "--masks", "0/0", "--vocab", "62080"),
                *("--only", "ours", "matmuls", "liger-scaled", "trl"),
                *("--ours", "backward=recompute", "--rounds", "3"),
            ),
        ),
    ),
    "cpu": Sizes(
        model={},
        lora={},
        seq_length=128,
        rows=2,
        steps=4,
        timed=2,
        operation=(96, 64, 1000),
        kernel=(
            (
                *("--hidden", "64", "--tokens", "64", "--masks", "0.5/0.2", "--vocab", "1000"),
                *("--ours", "chunk_vocab=300"),
                *("--rounds", "1", "--only", "ours", "matmuls", "official"),
            ),
        ),
    ),
}


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

    make_forward_step = main.make_forward_step
    vars(main)["make_forward_step"] = lambda begin: make_forward_step(begin_with(loss, begin))
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
