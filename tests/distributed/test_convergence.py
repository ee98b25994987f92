"""A small model trained for 100 steps with the fused operation and with the dense reference ends up the same.

All of it: every loss on the way and the final weights, on one process and with the vocabulary over two in a
loop of a few lines, and on one process in Megatron.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from spawned_ranks import spawn_ranks
from torch.nn import functional

from megatron_profit.objectives import build_objective
from megatron_profit.ops import linear_objective

DATA = Path(__file__).resolve().parents[2] / "examples" / "data" / "arithmetic_chatty.jsonl"
VOCAB, PADDED, H, TOKENS, STEPS = 251, 256, 24, 48, 100
# With what the backward pass of the fused path keeps.
OBJECTIVES = [
    (build_objective("profit", prob_threshold=0.003, threshold_direction="higher"), "save"),
    (build_objective("dft"), "recompute"),
]


def train(objective, group, **path):
    """Losses and cross-entropies [STEPS], and final weights, those of the output layer on this rank."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator) / 5

    embedding, mixing, output = random(VOCAB, H), random(H, H), random(PADDED, H)
    successor = torch.randperm(VOCAB, generator=generator)  # what there is to learn
    if group is not None:
        output = output.chunk(group.size())[group.rank()].clone()
    weights = [weight.requires_grad_() for weight in (embedding, mixing, output)]
    optimizer = torch.optim.AdamW(weights, lr=2e-2, eps=1e-6)
    losses, cross_entropies = [], []
    for _ in range(STEPS):
        # Some tokens are frequent, some labels are wrong, and a third is a prompt.
        tokens = (VOCAB * torch.rand(TOKENS, generator=generator) ** 2).long()
        noise = torch.randint(VOCAB, (TOKENS,), generator=generator)
        labels = successor[tokens].where(torch.rand(TOKENS, generator=generator) < 0.8, noise)
        labels[torch.rand(TOKENS, generator=generator) < 0.3] = -100
        hidden = functional.rms_norm(
            embedding[tokens] + torch.tanh(embedding[tokens] @ mixing), (H,)
        )
        loss, statistics = linear_objective(
            hidden, output, labels, objective, group=group, vocab_size=VOCAB, **path
        )
        optimizer.zero_grad()
        (loss.sum() / (labels != -100).sum()).backward()
        optimizer.step()
        losses.append(loss.detach().sum())
        cross_entropies.append(-statistics.log_prob[statistics.supervised].mean())
    return torch.stack(losses), torch.stack(cross_entropies), [w.detach() for w in weights]


def assert_same_training(group=None):
    for objective, backward in OBJECTIVES:
        dense = train(objective, group, implementation="reference")
        fused = train(objective, group, backward=backward)
        assert dense[1][-10:].mean() < dense[1][:10].mean() - 1, "it has learnt something"
        torch.testing.assert_close(fused, dense, rtol=1e-3, atol=1e-3)


def test_fused_and_reference_train_alike_on_one_process():
    assert_same_training()


def test_fused_and_reference_train_alike_on_a_split_vocabulary(tmp_path):
    spawn_ranks(assert_same_training, 2, tmp_path)


@pytest.mark.slow
def test_fused_and_reference_train_alike_in_megatron(sft, tied_model, tmp_path):
    """A tied Qwen3 through the whole entry, from the same weights on the same rows."""
    flags = [
        *("--hf-model", tied_model.hf, "--data", DATA),
        *("--objective", "profit", "--prob-threshold", 0.01, "--threshold-direction", "higher"),
        *("--objective-warmup-steps", STEPS // 2),
        *("--seq-length", 48, "--micro-batch-size", 2, "--global-batch-size", 4),
        *("--train-iters", STEPS, "--lr", 1e-3, "--adam-eps", 1e-6),
    ]
    runs = []
    for implementation in ("reference", "fused"):
        exported = tmp_path / implementation
        more = ("--objective-implementation", implementation, "--export-hf", exported)
        output = sft(1, *flags, *more).stdout
        metrics = [
            torch.tensor([float(value) for value in re.findall(rf"\| {name}: (\S+) \|", output)])
            for name in ("lm loss", "objective", "kept fraction", "grad norm")
        ]
        runs.append((metrics, load_file(exported / "model.safetensors")))
    (dense, dense_weights), (fused, fused_weights) = runs
    loss, _, kept, _ = dense
    assert len(loss) == STEPS
    assert loss[STEPS // 2 - 10 :].mean() < loss[:10].mean() - 1, "it has learnt something"
    assert 0.1 < kept[STEPS // 2 :].mean() < 0.95, "the mask has work to do"
    torch.testing.assert_close(fused, dense, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(fused_weights, dense_weights, rtol=2e-3, atol=2e-3)
