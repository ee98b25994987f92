"""Bad input ends a run before Megatron starts, with one clear message and nothing written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from make_tiny_model import make_tiny_model

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("bad") / "tiny", sorted(DATA.glob("*.jsonl")))


def bad_folder(tmp_path: Path, tiny: Path, **changes: object) -> Path:
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in tiny.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def chat_file(tmp_path: Path, content: str, name: str = "chat.jsonl") -> Path:
    (tmp_path / name).write_text(content)
    return tmp_path / name


CASES = {
    "no such model folder": lambda tmp, tiny: ({"--hf-model": tmp / "none"}, "none"),
    "a folder without a config": lambda tmp, tiny: ({"--hf-model": tmp}, "config.json"),
    "an unknown architecture": lambda tmp, tiny: (
        {"--hf-model": bad_folder(tmp, tiny, architectures=["GPTJForCausalLM"])},
        "GPTJForCausalLM",
    ),
    "a folder without a tokenizer": lambda tmp, tiny: (
        {"--hf-model": without_tokenizer(tmp, tiny)},
        "tokenizer",
    ),
    "a tokenizer larger than the model": lambda tmp, tiny: (
        {"--hf-model": bad_folder(tmp, tiny, vocab_size=300)},
        "300",
    ),
    "a broken tokenizer": lambda tmp, tiny: (
        {"--hf-model": broken_tokenizer(tmp, tiny)},
        "its tokenizer cannot be loaded",
    ),
    "no such data file": lambda tmp, tiny: ({"--data": tmp / "none.jsonl"}, "none.jsonl"),
    "an unknown suffix": lambda tmp, tiny: ({"--data": chat_file(tmp, "x", "chat.txt")}, ".txt"),
    "an unknown format": lambda tmp, tiny: (
        {"--data": chat_file(tmp, '{"text": "hello"}\n')},
        "text",
    ),
    "no data": lambda tmp, tiny: ({"--data": chat_file(tmp, "")}, "chat.jsonl"),
    "no assistant anywhere": lambda tmp, tiny: (
        {"--data": chat_file(tmp, '{"messages": [{"role": "user", "content": "hi"}]}\n')},
        "there is no assistant turn",
    ),
    "too many positions": lambda tmp, tiny: ({"--seq-length": 4096}, "4096"),
    "tensor parallelism": lambda tmp, tiny: ({"--tensor-model-parallel-size": 3}, "3"),
}


def without_tokenizer(tmp_path: Path, tiny: Path) -> Path:
    folder = bad_folder(tmp_path, tiny)
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    return folder


def broken_tokenizer(tmp_path: Path, tiny: Path) -> Path:
    folder = bad_folder(tmp_path, tiny)
    (folder / "tokenizer.json").write_text('{"model": {')
    return folder


# One of each kind through the whole entry; unit tests have the others' messages.
FAST = (
    "an unknown architecture",
    "a tokenizer larger than the model",
    "no such data file",
    "no assistant anywhere",
    "tensor parallelism",
)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case not in FAST)) for case in CASES]
)
def test_bad_input_is_refused(ranks, tmp_path, tiny, case):
    flags, named = CASES[case](tmp_path, tiny)
    command = {
        "--hf-model": tiny,
        "--data": DATA / "arithmetic_base.jsonl",
        "--seq-length": 48,
        "--micro-batch-size": 2,
        "--train-iters": 2,
        "--save": tmp_path / "save",
        "--tensorboard-dir": tmp_path / "tensorboard",
        **flags,
    }
    before = sorted(tmp_path.rglob("*"))
    result = ranks(
        1,
        *("-m", "megatron_profit.sft", "--device", "cpu", "--random-init"),
        *("--objective", "sft", "--lr", "1e-3"),
        *(part for pair in command.items() for part in pair),
        check=False,
    )
    assert result.returncode == 2, result.stdout
    (message,) = re.findall(r"^megatron-profit-sft: error: (?:.|\n)*", result.stdout, re.MULTILINE)
    assert named in message
    assert "Traceback" not in result.stdout
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


def test_the_message_is_seen_under_torchrun(torchrun, tmp_path, tiny):
    """Also when another process meets the error first: all but the first of a machine wait for it."""
    slow_start = tmp_path / "sitecustomize.py"
    slow_start.write_text(
        "import os, time\nif os.environ.get('LOCAL_RANK') == '0': time.sleep(4)\n"
    )
    result = torchrun(
        2,
        *("-m", "megatron_profit.sft", "--device", "cpu"),
        *("--hf-model", tiny, "--random-init", "--data", tmp_path / "none.jsonl"),
        *("--objective", "sft", "--lr", "1e-3", "--train-iters", 2),
        *("--seq-length", 48, "--micro-batch-size", 2),
        check=False,
        PYTHONPATH=os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])),
    )
    assert result.returncode != 0
    assert "CPU backend" not in result.stdout, "torch and Megatron are imported later"
    assert result.stdout.count("megatron-profit-sft: error:") == 1
    assert "none.jsonl" in result.stdout
