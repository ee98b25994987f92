"""`checkpoint_conversion.verify --logits`: Megatron's forward pass against that of transformers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_family

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.logits import PROMPTS, compare_logits, read_prompts

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("qwen2"), "qwen2")


def verify(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "checkpoint_conversion.verify", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, timeout=300)


@pytest.mark.slow
def test_a_conversion_computes_the_same(qwen2):
    release = qwen2.megatron / "release"
    result = verify("--hf", qwen2.hf, "--megatron", release, "--logits", "--tolerance", 1e-4)
    assert result.returncode == 0, result.stderr
    assert re.search(rf"logits of {len(PROMPTS)} prompts, \d+ positions", result.stdout)
    assert "top-1 agreement 100.00%" in result.stdout


@pytest.mark.slow
def test_what_no_tensor_shows_is_found(qwen2, tmp_path):
    """Another norm epsilon: every tensor is the same, and the weights come straight from the folder."""
    other = tmp_path / "other"
    other.mkdir()
    for file in qwen2.hf.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert verify("--hf", qwen2.hf, "--logits").returncode == 0
    result = verify("--hf", qwen2.hf, other, "--logits")
    assert result.returncode == 1, result.stderr
    assert "top-1 agreement" in result.stdout
    hf_to_megatron(other, tmp_path / "megatron")
    # Megatron refuses the checkpoint by its arguments, and says so through the command.
    with pytest.raises(ConversionError, match="layernorm_epsilon"):
        compare_logits(
            qwen2.hf, megatron=tmp_path / "megatron", iteration="release", prompts=["one two"]
        )


def test_bad_input_is_named(qwen2, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ConversionError, match=r"empty\.txt: no prompt"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(ConversionError, match="none"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match=r"config\.json declares"):
        compare_logits(tmp_path)
    shutil.copy(qwen2.hf / "config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConversionError, match="tokenizer cannot be loaded"):
        compare_logits(tmp_path)
