"""From a HuggingFace folder to a HuggingFace folder, with and without checkpoints in between."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from make_tiny_model import TinyShape, make_tiny_model
from tiny_models import make_family
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.megatron_to_hf import megatron_to_hf
from checkpoint_conversion.verify import verify

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
LAYOUTS = [
    pytest.param(
        2,
        "--tensor-model-parallel-size 2 --use-distributed-optimizer",
        True,
        id="tp2-distributed-optimizer",
    ),
    pytest.param(
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --bf16 "
        "--use-distributed-optimizer",
        True,
        id="tp2-pp2-sp-bf16-distributed-optimizer",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        4,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --bf16 "
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        False,
        id="pp2-vpp2-dp2-bf16-distributed-optimizer",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("world_size", "layout", "tied"), LAYOUTS)
def test_training_needs_no_conversion(sft, tmp_path, world_size, layout, tied):
    """Started from the folder or from its conversion, exported from the ranks or from the checkpoint:
    the same losses and the same bits."""
    shape = TinyShape(hidden_size=32, intermediate_size=64, num_layers=4, head_dim=16, tied=tied)
    hf = make_tiny_model(tmp_path / "hf", sorted(DATA.glob("*.jsonl")), shape)
    command = [
        *("--hf-model", hf, "--data", DATA / "arithmetic_base.jsonl", "--objective", "sft"),
        *("--seq-length", 40, "--micro-batch-size", 1, "--global-batch-size", 4, "--lr", 1e-2),
        *("--train-iters", 2, "--make-vocab-size-divisible-by", 96, *layout.split()),
    ]
    direct = sft(
        world_size, *command, "--export-hf", tmp_path / "direct", "--save", tmp_path / "run"
    )
    hf_to_megatron(hf, tmp_path / "converted")
    source = ("--pretrained-checkpoint", tmp_path / "converted")
    indirect = sft(world_size, *command, *source, "--export-hf", tmp_path / "indirect")
    megatron_to_hf(tmp_path / "run", hf, tmp_path / "of-checkpoint")

    assert losses(direct.stdout) == losses(indirect.stdout)
    assert len(losses(direct.stdout)) == 2
    assert not verify(tmp_path / "direct", tmp_path / "indirect").differences
    assert not verify(tmp_path / "direct", tmp_path / "of-checkpoint").differences
    names = {file.name for file in (tmp_path / "of-checkpoint").iterdir()}
    assert {file.name for file in (tmp_path / "direct").iterdir()} == names
    _check_stop_tokens(hf, [tmp_path / name for name in ("direct", "indirect", "of-checkpoint")])
    told = re.findall(r"> (?:in an export, )?eos_token_id in config.json .*", direct.stdout)
    assert [line.startswith("> in an export") for line in told] == [True, False], (
        "at start, at export"
    )
    trained, before = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (tmp_path / "direct", hf)
    )
    assert trained.keys() == before.keys()
    for name, weight in trained.items():
        distance = (weight - before[name]).abs()
        assert 0 < distance.max() < 0.1, name


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(*row, marks=[pytest.mark.slow] * (row[0] != "olmo2"))
        for row in (
            ("qwen3-moe", "--expert-model-parallel-size 2 --use-distributed-optimizer --bf16"),
            ("qwen3-moe", "--tensor-model-parallel-size 2 --sequence-parallel"),
            ("qwen3-moe-mixed", "--expert-model-parallel-size 2"),
            ("qwen2", "--tensor-model-parallel-size 2"),
            ("llama", "--pipeline-model-parallel-size 2"),
            ("olmo2", "--tensor-model-parallel-size 2 --use-distributed-optimizer --bf16"),
        )
    ],
)
def test_every_family_is_exported_as_from_its_checkpoint(sft, tmp_path, family, layout):
    hf = make_family(tmp_path, family).hf
    sft(
        2,
        *("--hf-model", hf, "--data", DATA / "arithmetic_base.jsonl", "--objective", "sft"),
        *("--seq-length", 40, "--micro-batch-size", 1, "--global-batch-size", 4, "--lr", 1e-2),
        *("--train-iters", 1, "--make-vocab-size-divisible-by", 96, *layout.split()),
        *("--export-hf", tmp_path / "direct", "--save", tmp_path / "run"),
    )
    megatron_to_hf(tmp_path / "run", hf, tmp_path / "of-checkpoint")
    assert not verify(tmp_path / "direct", tmp_path / "of-checkpoint").differences
    changed = {d.name for d in verify(hf, tmp_path / "direct").differences if d.what == "values"}
    trained, before = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (tmp_path / "direct", hf)
    )
    # Each tensor of every layer was trained, but for experts that no token was sent to.
    assert {name for name in changed if ".experts." in name} or "moe" not in family
    kept = {name for name in before.state_dict() if ".experts" not in name}
    assert kept <= changed
    for name, weight in trained.state_dict().items():
        assert (weight - before.state_dict()[name]).abs().max() < 0.1, name


def _check_stop_tokens(base: Path, exported: list[Path]) -> None:
    """The base stops at the end of a text, all that was trained from it at the end of a turn too."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    text, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    for name in ("config.json", "generation_config.json"):
        before = json.loads((base / name).read_text())
        (after,) = {(folder / name).read_text() for folder in exported}
        assert before["eos_token_id"] == text
        assert json.loads(after)["eos_token_id"] == [turn, text]


def losses(output: str) -> list[str]:
    return re.findall(r"\| lm loss: (\S+) \|", output)
