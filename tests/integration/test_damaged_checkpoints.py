"""Runs that are started from checkpoints which are damaged or would run something."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo

from checkpoint_conversion.hf_to_megatron import hf_to_megatron

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "examples" / "data"


class Creates:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self):
        return open, (str(self._canary), "w")


@pytest.fixture
def command(tiny) -> list[object]:
    return [
        *("--hf-model", tiny, "--data", DATA / "arithmetic_base.jsonl", "--objective", "sft"),
        *("--seq-length", 48, "--micro-batch-size", 4, "--global-batch-size", 8, "--lr", 1e-3),
        *("--train-iters", 4),
    ]


def steps(output: str) -> list[int]:
    return [int(number) for number in re.findall(r"^ iteration +(\d+)/", output, re.MULTILINE)]


def error(output: str) -> str:
    (message,) = re.findall(r"^megatron-profit-sft: error: (.*)$", output, re.MULTILINE)
    assert "Traceback" not in output
    return message


def test_a_run_goes_on_from_the_newest_checkpoint_without_a_flipped_bit(sft, command, tmp_path):
    saving = [*command, "--save", tmp_path, "--load", tmp_path, "--save-interval", 2]
    assert steps(sft(2, *saving).stdout) == [1, 2, 3, 4]
    newest = tmp_path / "iter_0000004"
    entry = FileSystemReader(newest).read_metadata()
    index = next(i for i in entry.storage_data if i.fqn.startswith("optimizer.state.exp_avg."))
    info = entry.storage_data[index]
    file = newest / info.relative_path
    content = bytearray(file.read_bytes())
    data = content.index(b"archive/data/0", info.offset, info.offset + info.length)
    content[data + 100] ^= 1
    file.write_bytes(content)
    output = sft(2, *saving).stdout
    assert steps(output) == [3, 4]
    (warning,) = re.findall(r"^WARNING: .* is skipped.*$", output, re.MULTILINE)
    assert f"{newest} is skipped, it is not whole: {file}: {index.fqn} is damaged: " in warning
    assert re.search(
        r"^> checksums of .*iter_0000002 compared: .* by 2 processes$", output, re.MULTILINE
    )
    assert steps(sft(2, *saving).stdout) == [], "what was saved anew is whole"


def poisoned(folder: Path, key: str, content: object) -> None:
    """Let an entry of a checkpoint be what torch.save writes of an object."""
    (folder / "checksums.json").unlink()
    metadata = FileSystemReader(folder).read_metadata()
    (index,) = (index for index in metadata.storage_data if index.fqn == key)
    torch.save(content, folder / "poison.distcp")
    size = (folder / "poison.distcp").stat().st_size
    metadata.storage_data[index] = _StorageInfo("poison.distcp", 0, size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.fixture
def pretrained(tiny, tmp_path) -> Path:
    hf_to_megatron(tiny, tmp_path / "megatron")
    return tmp_path / "megatron"


@pytest.mark.parametrize("flag", ["--pretrained-checkpoint", "--load"])
@pytest.mark.parametrize("skip", [(), ("--skip-checksums",)], ids=["checked", "unchecked"])
def test_a_checkpoint_that_would_run_something_is_refused(
    ranks, command, pretrained, tmp_path, flag, skip
):
    canary = tmp_path / "canary"
    key = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"
    poisoned(pretrained / "release", key, [Creates(canary)])
    entry = ["-m", "megatron_profit.sft", "--device", "cpu"]
    result = ranks(1, *entry, *command, flag, pretrained, *skip, check=False)
    assert result.returncode == 2
    message = error(result.stdout)
    assert f"poison.distcp: {key} cannot be loaded: it refers to io.open" in message.replace(
        "_io", "io"
    )
    assert not canary.exists()


@pytest.mark.slow
def test_logits_of_a_checkpoint_that_would_run_something_are_not_computed(
    tiny, pretrained, tmp_path
):
    canary = tmp_path / "canary"
    metadata = FileSystemReader(pretrained / "release").read_metadata()
    metadata.planner_data = Creates(canary)
    (pretrained / "release" / ".metadata").write_bytes(pickle.dumps(metadata))
    (pretrained / "release" / "checksums.json").unlink()
    for flags in (("--logits",), ()):
        arguments = ("--hf", tiny, "--megatron", pretrained, *flags)
        result = subprocess.run(
            [sys.executable, "-m", "checkpoint_conversion.verify", *map(str, arguments)],
            cwd=REPOSITORY,
            text=True,
            capture_output=True,
            timeout=300,
        )
        assert result.returncode == 2
        assert re.search(
            r"release/\.metadata: not readable: it refers to _?io\.open", result.stderr
        )
        assert "Traceback" not in result.stderr
        assert not canary.exists()


def test_pickles_of_ranks_are_refused_before_they_are_opened(ranks, command, pretrained, tmp_path):
    canary = tmp_path / "canary"
    shutil.rmtree(pretrained / "release")
    (pretrained / "release" / "mp_rank_00").mkdir(parents=True)
    torch.save(
        {"args": Creates(canary)}, pretrained / "release" / "mp_rank_00" / "model_optim_rng.pt"
    )
    entry = ["-m", "megatron_profit.sft", "--device", "cpu"]
    result = ranks(1, *entry, *command, "--load", pretrained, check=False)
    assert result.returncode == 2
    assert "release is in Megatron's older format (mp_rank_…)" in error(result.stdout)
    assert not canary.exists()
