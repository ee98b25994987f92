"""`megatron-profit sft --model DIR --data FILE` as a user starts it: a run, its files, and the same again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from make_tiny_model import make_tiny_model

DATA = Path(__file__).resolve().parents[2] / "examples" / "data" / "arithmetic_chatty.jsonl"
FEW = 80  # records


def command(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "megatron_profit", *words],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def sft(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    return command(folder, "sft", "--model", "tiny", "--data", "chats.jsonl", *flags, **environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model and a few chats."""
    folder = tmp_path_factory.mktemp("two_flags")
    make_tiny_model(folder / "tiny", [DATA])
    lines = DATA.read_text().splitlines()[:FEW]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def first(folder):
    return sft(folder)


def test_two_flags_train_and_leave_everything_in_the_runs_folder(folder, first):
    assert first.returncode == 0, first.stderr
    run = folder / "runs" / "tiny-profit-chats"
    assert {path.name for path in run.iterdir()} == {
        *("arguments.txt", "checkpoints", "command.sh", "config.yaml", "hf", "megatron.log"),
        *("metrics.jsonl", "tensorboard"),
    }
    assert (run / "hf" / "model.safetensors").is_file()
    assert "tensor_model_parallel_size = 1\n" in (run / "arguments.txt").read_text()
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(step["kind"] == "train" for step in steps) >= 2


def test_the_export_has_a_card_of_this_run_and_the_next_commands_are_shown(folder, first):
    run = folder / "runs" / "tiny-profit-chats"
    card = (run / "hf" / "README.md").read_text()
    assert "| `chats.jsonl` |" in card
    digest = hashlib.sha256((folder / "chats.jsonl").read_bytes()).hexdigest()
    assert digest in card
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    supervised = sum(step["supervised tokens"] for step in steps if step["kind"] == "train")
    assert f"| supervised tokens | {supervised:,} |" in card
    assert str(folder) not in card
    shown = first.stdout.splitlines()
    start = shown.index("> next, with runs/tiny-profit-chats/hf:")
    assert shown[start + 1].split() == ["megatron-profit", "chat", "runs/tiny-profit-chats/hf"]
    assert any(line.startswith("> checkpoints: every ") for line in shown)
    words = ("to-hf", "--megatron", run / "checkpoints", "--hf-template", "tiny", "--out", "back")
    converted = command(folder, *map(str, words))
    assert converted.returncode == 0, converted.stderr
    assert (folder / "back" / "README.md").read_text() == card, "the checkpoint's card is the run's"


def test_the_console_is_short_and_shows_the_command(folder, first):
    lines = first.stdout.splitlines()
    first_step = next(i for i, line in enumerate(lines) if line.startswith("step 1/"))
    assert first_step <= 40
    assert "arguments" not in first.stdout
    assert not first.stderr.strip(), "no warnings"
    (shown,) = (line for line in lines if line.startswith("torchrun "))
    script = (folder / "runs" / "tiny-profit-chats" / "command.sh").read_text()
    assert shown.split() == script.split("exec ")[1].replace("\\\n", " ").split()


def test_the_written_file_is_the_same_command(folder, first):
    assert first.returncode == 0
    config = folder / "runs" / "tiny-profit-chats" / "config.yaml"
    assert yaml.safe_load(config.read_text())["model"] == "tiny"
    again = command(folder, "sft", "--config", str(config), "--dry-run")
    assert again.returncode == 0, again.stderr
    (shown,) = (line for line in again.stdout.splitlines() if line.startswith("torchrun "))
    assert sorted(shown.split()) == sorted(
        next(line for line in first.stdout.splitlines() if line.startswith("torchrun ")).split()
    )


@pytest.mark.slow
def test_the_same_command_resumes_and_one_more_epoch_goes_on(folder, first):
    assert first.returncode == 0
    again = sft(folder)
    assert again.returncode == 0, again.stderr
    assert "goes on from its newest checkpoint" in again.stdout
    more = sft(folder, "--epochs", "2")
    assert more.returncode == 0, more.stderr
    steps = [line for line in more.stdout.splitlines() if line.startswith("step ")]
    assert steps
    assert not steps[0].startswith("step 1/")
    run = folder / "runs" / "tiny-profit-chats"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    supervised = sum(line["supervised tokens"] for line in lines if line["kind"] == "train")
    card = (run / "hf" / "README.md").read_text()
    assert f"| supervised tokens | {supervised:,} |" in card, "of both parts of the run"


@pytest.mark.slow
def test_another_objective_is_another_run_with_a_template_of_its_own(folder):
    result = sft(folder, "--objective", "dft", "--chat-template", "chatml", "--train-iters", "2")
    assert result.returncode == 0, result.stderr
    run = folder / "runs" / "tiny-dft-chats"
    assert "<|im_start|>" in (run / "hf" / "chat_template.jinja").read_text()


@pytest.mark.slow
def test_the_doctor_finds_no_fault_and_compares_with_transformers(folder):
    words = ("doctor", "--model", "tiny", "--data", "chats.jsonl", "--run", "runs/examined")
    result = command(folder, *words)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ok      mathematics" in result.stdout
    assert "within the rounding of fp32" in result.stdout
    assert "⟦" in result.stdout


@pytest.mark.slow
def test_the_doctor_names_a_checkpoint_of_another_model(folder, first):
    assert first.returncode == 0
    other = folder / "other"
    shutil.copytree(folder / "tiny", other)
    config = json.loads((other / "config.json").read_text())
    config["rope_theta"] = 12345.0
    config.get("rope_parameters", {})["rope_theta"] = 12345.0
    (other / "config.json").write_text(json.dumps(config))
    words = ("--model", "other", "--data", "chats.jsonl", "--run", "runs/tiny-profit-chats")
    result = command(folder, "doctor", *words)
    assert result.returncode == 1
    assert "FAULT   checkpoint" in result.stdout
    assert "rotary_base" in result.stdout
