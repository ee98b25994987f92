"""A stored output layer beside tied embeddings: one rank compares the two, all fail together."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from tiny_models import make_model

SCRIPT = Path(__file__).parent / "load_tied_copy.py"


def test_only_the_first_rank_reads_both_copies(ranks, tmp_path):
    hf = make_model(tmp_path, tied=True).hf
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    output = ranks(2, SCRIPT, hf).stdout
    message = "lm_head.weight differs from model.embed_tokens.weight"
    assert [rank for rank in (0, 1) if f"rank {rank}: 2 reads: " in output] == [0]
    assert "rank 1: 0 reads: " in output
    assert output.count(message) == 2
