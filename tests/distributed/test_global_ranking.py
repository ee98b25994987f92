"""A ranking over the global batch keeps the same tokens at any layout."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_models import EXAMPLES
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_profit.data import ChatRenderer, SFTDataset, build_examples
from megatron_profit.objectives import kept_count

DATA, HELD_OUT = EXAMPLES / "arithmetic_chatty.jsonl", EXAMPLES / "arithmetic_heldout.jsonl"
SEQ_LENGTH, BATCH, SEED, SHARE = 48, 8, 5, 0.3
LAYOUTS = {
    "one-by-one": (1, "--micro-batch-size 1"),
    "dp2": (2, "--micro-batch-size 2"),
    "pp2-tp2": (
        4,
        "--micro-batch-size 4 --pipeline-model-parallel-size 2 --tensor-model-parallel-size 2",
    ),
}


@pytest.fixture(scope="module")
def expected(untied_model) -> list[float]:
    """The mean cross-entropy of the kept tokens of the first global batch, and of an evaluation."""
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(untied_model.hf))
    model = AutoModelForCausalLM.from_pretrained(untied_model.hf, dtype=torch.float64)
    losses = []
    # The order of validation rows is the same whatever the run's seed.
    evaluation = {"seed": 0, "period": BATCH}
    for file, options in ((DATA, {"seed": SEED}), (HELD_OUT, evaluation)):
        examples, _ = build_examples([file], renderer, SEQ_LENGTH)
        dataset = SFTDataset(examples, SEQ_LENGTH, BATCH, **options)
        rows = [dataset[i] for i in range(BATCH)]
        tokens, labels = (torch.stack([row[n] for row in rows]) for n in ("tokens", "labels"))
        with torch.no_grad():
            log_probs = model(tokens).logits.log_softmax(-1)[labels != -100]
        entropy = torch.special.entr(log_probs.exp()).sum(-1)
        kept = entropy.topk(kept_count(SHARE, len(entropy))).indices
        targets = labels[labels != -100]
        losses.append(-float(log_probs[kept, targets[kept]].mean()))
    return losses


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[pytest.mark.slow] * (n != "dp2")) for n in LAYOUTS]
)
def test_any_layout_keeps_the_same_tokens(sft, untied_model, expected, layout):
    world_size, flags = LAYOUTS[layout]
    output = sft(
        world_size,
        *("--hf-model", untied_model.hf, "--pretrained-checkpoint", untied_model.megatron),
        *("--data", DATA, "--no-packing", "--seq-length", SEQ_LENGTH, "--seed", SEED),
        *("--lr", 1e-20, "--global-batch-size", BATCH, "--train-iters", 1, "--eval-iters", 1),
        *("--valid-data", HELD_OUT, "--objective", "entropy"),
        *("--rank-scope", "global_batch", "--keep-share", SHARE, *flags.split()),
    ).stdout
    trained = float(re.search(r"\| objective: (\S+) \|", output).group(1))
    evaluated = float(re.search(r"objective value: (\S+)", output).group(1))
    assert [trained, evaluated] == pytest.approx(expected, rel=2e-6)
