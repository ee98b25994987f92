"""Flags of a model with Gated DeltaNet layers: what follows from config.json, and what is refused."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
from pathlib import Path

import pytest

from megatron_profit.flags import ArgumentsError
from megatron_profit.training.arguments.derive import RunSettings, derive

LINEAR, FULL = "linear_attention", "full_attention"
CONFIG = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "vocab_size": 507,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "layer_types": [LINEAR, LINEAR, LINEAR, FULL] * 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
    },
    "tie_word_embeddings": True,
}


@pytest.fixture
def parse(tmp_path: Path):
    """Reads flags on top of the required ones; returns the settings."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def run(*flags: str, world_size: int = 1, device: str = "cpu") -> RunSettings:
        required = ["--hf-model", str(tmp_path), "--data", "a.jsonl", "--seq-length", "64"]
        required += "--micro-batch-size 2 --lr 1e-5 --train-iters 9 --objective sft".split()
        return derive([*required, *flags], device, world_size)

    return run


def test_the_layers_follow_from_the_config(parse):
    values = parse("--tensor-model-parallel-size", "2", world_size=2).values
    assert values["experimental_attention_variant"] == "gated_delta_net"
    assert values["linear_attention_freq"] == 4
    assert values["attention_output_gate"] is True
    assert values["layernorm_zero_centered_gamma"] is True


def test_tensor_parallelism_must_divide_the_heads_of_the_states(parse):
    with pytest.raises(ArgumentsError) as raised:
        parse("--tensor-model-parallel-size", "4", world_size=4)
    assert str(raised.value) == (
        "--tensor-model-parallel-size 4 does not divide the model's linear_num_key_heads 2; it can be "
        "1, 2"
    )


def test_context_parallelism_splits_the_heads_as_well(parse):
    layout = ("--context-parallel-size", "2")
    assert parse(*layout, world_size=2).values["context_parallel_size"] == 2
    with pytest.raises(ArgumentsError, match="tensor x context parallel size 4 does not divide"):
        parse(*layout, "--tensor-model-parallel-size", "2", world_size=4)


@pytest.mark.parametrize("installed", [True, False])
def test_a_gpu_needs_the_kernels_or_plain_torch(parse, monkeypatch, installed):
    real, found = importlib.util.find_spec, {"transformer_engine": True, "fla": installed}

    def find_spec(name: str, package: str | None = None) -> object:
        if name not in found:
            return real(name, package)
        return importlib.machinery.ModuleSpec(name, None) if found[name] else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    if installed:
        assert parse(device="cuda").values["transformer_impl"] == "transformer_engine"
        return
    with pytest.raises(ArgumentsError, match="pip install flash-linear-attention, or give --tran"):
        parse(device="cuda")
    assert parse("--transformer-impl", "local", device="cuda").values["transformer_impl"] == "local"
