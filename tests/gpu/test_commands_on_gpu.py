"""The commands of a user on a machine with a GPU: train with two flags, resume, and the doctor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from make_tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DATA = Path(__file__).resolve().parents[2] / "examples" / "data" / "arithmetic_chatty.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model and a few chats."""
    folder = tmp_path_factory.mktemp("commands")
    make_tiny_model(folder / "tiny", [DATA])
    lines = DATA.read_text().splitlines()[:80]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def command(folder: Path, name: str, *flags: str) -> str:
    """What a command prints, which ends well, on the first GPU."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "megatron_profit", name, *flags),
            *("--model", "tiny", "--data", "chats.jsonl"),
        ],
        cwd=folder,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_flags_train_and_go_on(folder):
    def steps() -> list[int]:
        lines = (folder / "runs" / "tiny-profit-chats" / "metrics.jsonl").read_text().splitlines()
        return [line["step"] for line in map(json.loads, lines) if line["kind"] == "train"]

    command(folder, "sft", "--train-iters", "3", "--lr-decay-iters", "6")
    assert steps() == [1, 2, 3]
    command(folder, "sft", "--train-iters", "6", "--lr-decay-iters", "6")
    assert steps() == [1, 2, 3, 4, 5, 6]
    assert (folder / "runs" / "tiny-profit-chats" / "hf" / "model.safetensors").is_file()


def test_the_doctor_finds_no_fault(folder):
    printed = command(folder, "doctor", "--run", "runs/examined")
    assert "ok      mathematics" in printed
    assert "FAULT" not in printed
