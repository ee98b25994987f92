"""The training entry on a GPU takes the steps that the CPU backend takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from make_tiny_model import make_tiny_model

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_losses_on_a_gpu_are_those_on_the_cpu(torchrun, tmp_path):
    model = make_tiny_model(tmp_path / "model", sorted(DATA.glob("*.jsonl")))
    # One checkpoint for both, because random weights come from another generator on each device.
    start = ["--save", tmp_path / "start", "--train-iters", 1]
    resume = ["--pretrained-checkpoint", tmp_path / "start", "--train-iters", 4]
    flags = [
        *("--hf-model", model, "--random-init", "--data", DATA / "arithmetic_base.jsonl"),
        *("--objective", "profit", "--prob-threshold", "0.001", "--threshold-direction", "higher"),
        *("--seq-length", 40, "--micro-batch-size", 4, "--global-batch-size", 8, "--lr", 1e-3),
    ]

    def losses(device: str, *more: object) -> list[float]:
        entry = ["-m", "megatron_profit.sft", "--device", device, *flags, *more]
        output = torchrun(1, *entry, CUDA_VISIBLE_DEVICES="0").stdout
        return [float(value) for value in re.findall(r"\| lm loss: (\S+) \|", output)]

    losses("cpu", *start)
    on_cpu, on_gpu = losses("cpu", *resume), losses("cuda", *resume)
    assert len(on_gpu) == 4
    assert on_gpu == [pytest.approx(loss, rel=1e-3) for loss in on_cpu]
