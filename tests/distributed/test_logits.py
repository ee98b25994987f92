"""A converted checkpoint, loaded by Megatron at several layouts, gives HuggingFace's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parent / "save_logits.py"
LAYOUTS = {
    "tp1": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_huggingface(request, torchrun, tmp_path, layout, tied):
    model = request.getfixturevalue("tied_model" if tied else "untied_model")
    tokens = torch.randint(0, 508, (2, 48), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, tmp_path / "tokens.pt")
    world_size, flags = LAYOUTS[layout]
    # Padding the vocabulary to a multiple of 16 per rank must not show either.
    torchrun(
        world_size,
        *(SCRIPT, "--tokens", tmp_path / "tokens.pt", "--logits", tmp_path / "logits.pt"),
        *("--hf-model", model.hf, "--load", model.megatron, "--data", "unread.jsonl"),
        *("--objective", "sft", "--seq-length", 48, "--micro-batch-size", 2, "--lr", 1e-3),
        *("--train-iters", 1, "--make-vocab-size-divisible-by", 16, *flags.split()),
    )
    logits = torch.load(tmp_path / "logits.pt")
    reference = AutoModelForCausalLM.from_pretrained(model.hf, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(tokens).logits
    assert expected.std() > 0.5, "logits too flat to show a mistake"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
