"""A converted checkpoint, loaded by Megatron at several layouts, gives HuggingFace's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import make_family
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parent / "save_logits.py"
TP_SP = "--tensor-model-parallel-size 2 --sequence-parallel"
LAYOUTS = {
    "tp1": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2-sp": (2, TP_SP),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2-vpp2": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "cp2": (2, "--context-parallel-size 2"),
    "cp2-pp2": (4, "--context-parallel-size 2 --pipeline-model-parallel-size 2"),
}


slow = pytest.mark.slow
EXPERTS = "--expert-model-parallel-size 2"
# Expert tensor parallelism is that of the rest unless a flag says otherwise.
FAMILY_LAYOUTS = [
    pytest.param("qwen3-moe", 2, EXPERTS, id="qwen3-moe-ep2"),
    pytest.param("qwen3-moe", 2, TP_SP, id="qwen3-moe-tp2-etp2", marks=slow),
    pytest.param(
        "qwen3-moe",
        2,
        f"{TP_SP} {EXPERTS} --expert-tensor-parallel-size 1",
        id="qwen3-moe-tp2-ep2",
        marks=slow,
    ),
    pytest.param(
        "qwen3-moe",
        4,
        f"--pipeline-model-parallel-size 2 {EXPERTS}",
        id="qwen3-moe-ep2-pp2",
        marks=slow,
    ),
    pytest.param("qwen3-moe", 4, f"{TP_SP} {EXPERTS}", id="qwen3-moe-tp2-ep2-etp2", marks=slow),
    pytest.param("qwen3-moe-mixed", 2, EXPERTS, id="qwen3-moe-mixed-ep2", marks=slow),
    pytest.param("qwen3.5", 1, "", id="qwen3.5-tp1", marks=slow),
    pytest.param("qwen3.5", 2, "--tensor-model-parallel-size 2", id="qwen3.5-tp2"),
    pytest.param("qwen3.5", 2, TP_SP, id="qwen3.5-tp2-sp", marks=slow),
    pytest.param("qwen3.5", 2, "--pipeline-model-parallel-size 2", id="qwen3.5-pp2", marks=slow),
    pytest.param("qwen3.5-moe", 2, EXPERTS, id="qwen3.5-moe-ep2"),
    pytest.param("qwen3.5-moe", 2, TP_SP, id="qwen3.5-moe-tp2-etp2", marks=slow),
    pytest.param("qwen2", 2, "--tensor-model-parallel-size 2", id="qwen2-tp2"),
    pytest.param("llama", 2, "--tensor-model-parallel-size 2", id="llama-tp2"),
    pytest.param("llama", 2, "--pipeline-model-parallel-size 2", id="llama-pp2", marks=slow),
    pytest.param("olmo2", 2, TP_SP, id="olmo2-tp2-sp"),
    pytest.param("olmo2", 3, "--tensor-model-parallel-size 3", id="olmo2-tp3", marks=slow),
    pytest.param("olmo2", 2, "--pipeline-model-parallel-size 2", id="olmo2-pp2", marks=slow),
]


# Tied embeddings at every layout; an output layer of its own where all kinds of parallelism meet.
FAST = {("tp2-sp", "tied"), ("pp2", "tied"), ("tp2-pp2", "tied"), ("tp2-pp2", "untied")}


@pytest.mark.parametrize(
    ("layout", "tied"),
    [
        pytest.param(layout, kind == "tied", id=f"{layout}-{kind}", marks=[slow] * is_slow)
        for layout in LAYOUTS
        for kind in ("tied", "untied")
        for is_slow in [(layout, kind) not in FAST]
    ],
)
def test_logits_are_those_of_huggingface(request, ranks, tmp_path, layout, tied):
    model = request.getfixturevalue("tied_model" if tied else "untied_model")
    compare_logits(ranks, tmp_path, model, *LAYOUTS[layout])


@pytest.mark.parametrize(("family", "world_size", "flags"), FAMILY_LAYOUTS)
def test_logits_of_every_family(ranks, tmp_path, family, world_size, flags):
    compare_logits(ranks, tmp_path, make_family(tmp_path, family), world_size, flags)


def compare_logits(ranks, tmp_path, model, world_size, flags):
    tokens = torch.randint(0, 508, (3, 48), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, tmp_path / "tokens.pt")
    # Padding the vocabulary to a multiple of 16 per rank must not show either.
    ranks(
        world_size,
        *(SCRIPT, tmp_path / "tokens.pt", tmp_path / "logits.pt", "--hf-model", model.hf),
        *("--load", model.megatron, "--make-vocab-size-divisible-by", 16, *flags.split()),
    )
    logits = torch.load(tmp_path / "logits.pt")
    reference = AutoModelForCausalLM.from_pretrained(model.hf, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(tokens).logits
    assert expected.std() > 0.5, "logits too flat to show a mistake"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
