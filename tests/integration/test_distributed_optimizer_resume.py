"""Runs with the distributed optimizer, saved and resumed as a user does it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from make_tiny_model import TinyShape, make_tiny_model

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
METRICS = ("lm loss", "grad norm")


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[object]:
    shape = TinyShape(hidden_size=32, intermediate_size=64, head_dim=16)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model = make_tiny_model(folder, sorted(DATA.glob("*.jsonl")), shape)
    return [
        *("--hf-model", model, "--random-init", "--data", DATA / "arithmetic_base.jsonl"),
        *("--objective", "sft", "--seq-length", 48, "--micro-batch-size", 4),
        *("--global-batch-size", 8, "--lr", 1e-3, "--train-iters", 6),
        "--use-distributed-optimizer",
    ]


def logged(output: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"\| {name}: (\S+) \|", output)]


@pytest.mark.parametrize(
    "precision", [pytest.param((), marks=pytest.mark.slow), ("--bf16",)], ids=["fp32", "bf16"]
)
def test_a_resumed_run_continues_like_the_uninterrupted_one(sft, command, tmp_path, precision):
    command = [*command, *precision]
    whole = sft(2, *command).stdout
    saving = [*command, "--save", tmp_path, "--load", tmp_path, "--save-interval", 3]
    first = sft(2, *saving, "--exit-interval", 3).stdout
    second = sft(2, *saving).stdout
    for name in METRICS:
        assert len(logged(second, name)) == 3
        assert logged(first, name) + logged(second, name) == logged(whole, name), name
