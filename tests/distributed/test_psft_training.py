"""PSFT on several processes follows a plain implementation on one, step by step."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import EXAMPLES, TinyModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_conversion.megatron_to_hf import megatron_to_hf
from megatron_profit.data import ChatRenderer, SFTDataset, build_examples

FILE_NAME = "old_policy.safetensors"

DATA = EXAMPLES / "arithmetic_chatty.jsonl"
SEQ_LENGTH, BATCH, SEED = 48, 8, 5
STEPS, PER_REFRESH, CLIP = 6, 4, 0.28
RATE = 1e-3
FLAGS = [
    *("--data", DATA, "--no-packing", "--seq-length", SEQ_LENGTH, "--seed", SEED),
    *("--global-batch-size", BATCH),
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
                "mean ratio": float(ratio.detach().mean()),
                "clip fraction": float((ratio > 1 + CLIP).double().mean()),
            }
        )
    names = load_file(tied_model.hf / "model.safetensors").keys()
    return Trained(metrics, {name: model.state_dict()[name] for name in names})


@pytest.fixture
def psft(sft, tied_model):
    """Trains with PSFT and gives what the run printed."""

    def run(save: Path, world_size: int, *flags: object, **options: object) -> str:
        model = ("--hf-model", tied_model.hf, "--pretrained-checkpoint", tied_model.megatron)
        return sft(world_size, *model, *FLAGS, "--save", save, *flags, **options).stdout

    return run


def weights_in(save: Path, model: TinyModel, out: Path) -> dict[str, torch.Tensor]:
    """The weights of the latest checkpoint by HuggingFace name."""
    megatron_to_hf(save, model.hf, out)
    return {n: w.double() for n, w in load_file(out / "model.safetensors").items()}


def logged(output: str) -> list[dict[str, float]]:
    lines = re.findall(r"iteration +\d+/.*", output)
    return [
        {name: float(v) for name, v in re.findall(r"\| *([A-Za-z ]+): +([-+.\dE]+) (?=\|)", line)}
        for line in lines
    ]


DISTRIBUTED = (
    "--micro-batch-size 2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
).split()
LAYOUTS = {
    "dp2-distributed-optimizer": (2, DISTRIBUTED),
    "tp2-sp": (
        2,
        "--micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel".split(),
    ),
    "pp2": (2, "--micro-batch-size 2 --pipeline-model-parallel-size 2".split()),
    "pp2-virtual": (
        2,
        "--micro-batch-size 1 --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1".split(),
    ),
    "tp2-dp2": (4, "--micro-batch-size 1 --tensor-model-parallel-size 2".split()),
}
SLOW = ("pp2-virtual", "tp2-dp2")


def assert_same_steps(metrics, expected):
    assert len(metrics) == len(expected)
    for step, (here, there) in enumerate(zip(metrics, expected, strict=True)):
        for name, value in there.items():
            assert here[name] == pytest.approx(value, rel=2e-6), f"{name} of step {step}"


def assert_same_weights(weights, expected):
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        # Each of the steps rounds a weight of about 1 once, beside the rounding of its gradient.
        torch.testing.assert_close(
            weights[name], weight, rtol=2e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in LAYOUTS]
)
def test_every_step_is_that_of_a_plain_implementation(psft, tied_model, plain, tmp_path, layout):
    world_size, flags = LAYOUTS[layout]
    metrics = logged(psft(tmp_path / "save", world_size, *flags))
    assert_same_steps(metrics, plain.metrics)
    assert max(step["clip fraction"] for step in metrics) > 0.1, "nothing is clipped"
    assert_same_weights(
        weights_in(tmp_path / "save", tied_model, tmp_path / "after"), plain.weights
    )


def test_a_run_resumes_inside_an_outer_batch(psft, tied_model, plain, tmp_path):
    save = tmp_path / "save"
    valid = ("--valid-data", EXAMPLES / "arithmetic_heldout.jsonl", "--eval-interval", 3)
    flags = [*DISTRIBUTED, "--load", save, *valid]
    first = psft(save, 2, *flags, "--save-interval", 2, "--exit-interval", 2)
    assert (save / "iter_0000002" / FILE_NAME).is_file()
    second = psft(save, 2, *flags)
    assert_same_steps(logged(first) + logged(second), plain.metrics)
    assert_same_weights(weights_in(save, tied_model, tmp_path / "after"), plain.weights)
    # In an evaluation the old policy is the current one, and what is reported is plain SFT.
    objective, plain_loss = (
        [float(v) for v in re.findall(rf"validation loss at .*\| {name} value: (\S+)", second)]
        for name in ("objective", "lm loss")
    )
    assert objective == pytest.approx(plain_loss, rel=1e-6)
    assert len(objective) == 3

    (save / "iter_0000002" / FILE_NAME).unlink()
    (save / "latest_checkpointed_iteration.txt").write_text("2")
    refused = psft(save, 2, *flags, check=False)
    assert re.search(r"iteration 2 is inside an outer batch of 4 steps, but .* is missing", refused)


@pytest.mark.slow
def test_a_run_resumes_inside_an_outer_batch_at_another_layout(psft, plain, tied_model, tmp_path):
    save = tmp_path / "save"
    first = psft(save, 2, "--micro-batch-size", 2, "--save-interval", 3, "--exit-interval", 3)
    flags = "--micro-batch-size 4 --pipeline-model-parallel-size 2".split()
    second = psft(save, 2, *flags, "--load", save)
    assert_same_steps(logged(first) + logged(second), plain.metrics)
    assert_same_weights(weights_in(save, tied_model, tmp_path / "after"), plain.weights)
