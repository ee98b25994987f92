"""Objectives with a reference model: its numbers come from another model, once, and serve later runs."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_models import EXAMPLES
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_profit.data import ChatRenderer, SFTDataset, build_examples
from megatron_profit.objectives import TokenStatistics, build_objective

DATA = EXAMPLES / "arithmetic_chatty.jsonl"
SEQ_LENGTH, BATCH, SEED = 48, 8, 5


@pytest.fixture(scope="module")
def reference(untied_model, tmp_path_factory):
    """A model near the one that is trained."""
    folder = tmp_path_factory.mktemp("reference")
    model = AutoModelForCausalLM.from_pretrained(untied_model.hf, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def expected(untied_model, reference, file, options, objective) -> float:
    """The objective of the first global batch, by plain models in double precision."""
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(untied_model.hf))
    examples, _ = build_examples([file], renderer, SEQ_LENGTH)
    dataset = SFTDataset(examples, SEQ_LENGTH, BATCH, **options)
    rows = [dataset[i] for i in range(BATCH)]
    tokens, labels = (torch.stack([row[n] for row in rows]) for n in ("tokens", "labels"))
    log_probs = []
    for folder in (untied_model.hf, reference):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        with torch.no_grad():
            of_all = model(tokens).logits.log_softmax(-1)[labels != -100]
        log_probs.append(of_all.gather(1, labels[labels != -100][:, None])[:, 0])
    loss, weight = objective(TokenStatistics(log_prob=log_probs[0], ref_log_prob=log_probs[1]))
    divisor = (weight != 0).sum() if objective.normalization == "kept" else len(loss)
    return float(loss.sum() / divisor)


RUNS = {
    "rho1-global-dp2": (
        2,
        build_objective("rho1", keep_share=0.4),
        "--objective rho1 --keep-share 0.4 --rank-scope global_batch --micro-batch-size 2",
    ),
    "iw-sft-tp2": (
        2,
        build_objective("iw-sft"),
        "--objective iw-sft --micro-batch-size 8 --tensor-model-parallel-size 2",
    ),
    "iw-sft-pp2": (
        2,
        build_objective("iw-sft"),
        "--objective iw-sft --micro-batch-size 2 --pipeline-model-parallel-size 2",
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n.startswith("iw-sft"))) for n in RUNS]
)
def test_the_reference_gives_its_numbers(sft, untied_model, reference, tmp_path, name):
    world_size, objective, flags = RUNS[name]
    cache = tmp_path / "cache"

    def run():
        output = sft(
            world_size,
            *("--hf-model", untied_model.hf, "--ref-hf-model", reference, "--ref-cache", cache),
            *("--data", DATA, "--no-packing", "--seq-length", SEQ_LENGTH, "--seed", SEED),
            *("--lr", 1e-20, "--global-batch-size", BATCH, "--train-iters", 1, "--eval-iters", 1),
            *("--valid-data", EXAMPLES / "arithmetic_heldout.jsonl", *flags.split()),
        ).stdout
        trained = float(re.search(r"\| objective: (\S+) \|", output).group(1))
        return output, [trained, float(re.search(r"objective value: (\S+)", output).group(1))]

    output, values = run()
    assert "reference log-probabilities: train row 0" in output
    assert values == pytest.approx(
        [
            expected(untied_model, reference, DATA, {"seed": SEED}, objective),
            expected(
                untied_model,
                reference,
                EXAMPLES / "arithmetic_heldout.jsonl",
                {"seed": 0, "period": BATCH},
                objective,
            ),
        ],
        rel=2e-5,
    )
    if name.startswith("rho1"):
        again, same = run()
        assert "reference log-probabilities" not in again
        assert same == values
        assert len(list(cache.iterdir())) == 2
