"""PSFT on several processes follows a plain implementation on one, step by step."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import EXAMPLES, TinyModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_conversion.megatron_to_hf import megatron_to_hf
from megatron_profit.data import ChatRenderer, SFTDataset, build_examples

DATA = EXAMPLES / "arithmetic_chatty.jsonl"
SEQ_LENGTH, BATCH, SEED = 48, 8, 5
STEPS, PER_REFRESH, CLIP = 6, 4, 0.28
RATE = 1e-3
FLAGS = [
    *("--data", DATA, "--seq-length", SEQ_LENGTH, "--seed", SEED, "--global-batch-size", BATCH),
    *("--train-iters", STEPS, "--lr", RATE, "--min-lr", RATE, "--clip-grad", 0),
    *("--adam-eps", 1e-3, "--weight-decay", 0.1, "--objective", "psft"),
    *("--psft-steps-per-refresh", PER_REFRESH, "--clip-high", CLIP),
]


@dataclass(frozen=True)
class Trained:
    """What a run leaves: a line of metrics for each step, and the weights."""

    metrics: list[dict[str, float]]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain(tied_model) -> Trained:
    """A training loop as one would write it, in double precision."""
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(tied_model.hf))
    examples, _ = build_examples([DATA], renderer, SEQ_LENGTH)
    dataset = SFTDataset(examples, SEQ_LENGTH, STEPS * BATCH, seed=SEED)
    model = AutoModelForCausalLM.from_pretrained(tied_model.hf, dtype=torch.float64)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    # Megatron decays matrices only.
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-3)

    def log_prob(step: int) -> torch.Tensor:
        rows = [dataset[i] for i in range(step * BATCH, (step + 1) * BATCH)]
        tokens, labels = (torch.stack([row[name] for row in rows]) for name in ("tokens", "labels"))
        log_probs = model(tokens).logits.log_softmax(-1)
        return log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]

    metrics = []
    for step in range(STEPS):
        if step % PER_REFRESH == 0:
            outer = range(step, min(step + PER_REFRESH, STEPS))
            with torch.no_grad():
                old = {later: log_prob(later) for later in outer}
        current = log_prob(step)
        ratio = (current - old[step]).exp()
        loss = -torch.minimum(ratio, ratio.clamp(max=1 + CLIP)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        metrics.append(
            {
                "objective": float(loss.detach()),
                "lm loss": float(-current.detach().mean()),
                "kept fraction": float((ratio <= 1 + CLIP).double().mean()),
            }
        )
    names = load_file(tied_model.hf / "model.safetensors").keys()
    return Trained(metrics, {name: model.state_dict()[name] for name in names})


@pytest.fixture
def psft(sft, tmp_path):
    """Trains with PSFT; gives the metrics and the weights after the last step."""

    def run(model: TinyModel, world_size: int, *flags: object) -> Trained:
        result = sft(
            world_size,
            *("--hf-model", model.hf, "--pretrained-checkpoint", model.megatron, *FLAGS),
            *("--save", tmp_path / "save", *flags),
        )
        megatron_to_hf(tmp_path / "save", model.hf, tmp_path / "after")
        weights = load_file(tmp_path / "after" / "model.safetensors")
        return Trained(logged(result.stdout), {n: w.double() for n, w in weights.items()})

    return run


def logged(output: str) -> list[dict[str, float]]:
    lines = re.findall(r"iteration +\d+/.*", output)
    return [
        {name: float(v) for name, v in re.findall(r"\| *([A-Za-z ]+): +([-+.\dE]+) (?=\|)", line)}
        for line in lines
    ]


LAYOUTS = {
    "dp2-distributed-optimizer": (
        2,
        "--micro-batch-size 2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "tp2-sp": (2, "--micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--micro-batch-size 2 --pipeline-model-parallel-size 2"),
    "pp2-virtual": (
        2,
        "--micro-batch-size 1 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_step_is_that_of_a_plain_implementation(psft, tied_model, plain, layout):
    world_size, flags = LAYOUTS[layout]
    trained = psft(tied_model, world_size, *flags.split())
    assert len(trained.metrics) == STEPS
    for step, (here, there) in enumerate(zip(trained.metrics, plain.metrics, strict=True)):
        for name, value in there.items():
            assert here[name] == pytest.approx(value, rel=2e-6), f"{name} of step {step}"
    assert_same_weights(trained.weights, plain.weights)


def assert_same_weights(weights, expected):
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        # Each of the steps rounds a weight of about 1 once, beside the rounding of its gradient.
        torch.testing.assert_close(
            weights[name], weight, rtol=2e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
