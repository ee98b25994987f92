"""Tiny Qwen3 folders with random weights, as HuggingFace and as Megatron checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from make_tiny_model import TinyShape, make_tiny_model
from safetensors.torch import load_file, save_file

from checkpoint_conversion.hf_to_megatron import hf_to_megatron

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples" / "data"


@dataclass(frozen=True)
class TinyModel:
    """A random Qwen3 as a HuggingFace folder and as a Megatron checkpoint of the same weights."""

    hf: Path
    megatron: Path


def make_model(folder: Path, *, tied: bool) -> TinyModel:
    # 508 rows: a multiple of 4 that is not one of 8, and more rows than the tokenizer has tokens.
    shape = TinyShape(
        vocab_size=508,
        hidden_size=64,
        intermediate_size=96,
        num_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tied=tied,
    )
    hf = make_tiny_model(folder / "hf", sorted(EXAMPLES.glob("*.jsonl")), shape, seed=7)
    # Norms of ones and tiny logits would hide mistakes.
    weights = load_file(hf / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, weight in weights.items():
        if "norm" in name:
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
        else:
            weight *= 3.0
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(hf, folder / "megatron")
    return TinyModel(hf, folder / "megatron")
