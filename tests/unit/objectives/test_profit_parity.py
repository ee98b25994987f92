"""ProFit against the computation of its official code, restated here in a few lines of plain torch."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from megatron_profit.data import ChatRenderer, SFTDataset, build_examples
from megatron_profit.objectives import TokenStatistics, build_objective
from megatron_profit.ops import linear_objective

IGNORED = -100
CASES = [
    ("higher", [0.1]),
    ("higher", [0.5]),
    ("lower", [0.1]),
    ("middle", [0.05, 0.4]),
    ("random", [0.3]),
]


def official_loss(logits, labels, direction, tau, uniform, num_tokens):
    """Softmax in float32, mask, masked cross-entropy, division by the labels or by the kept tokens."""
    logits = logits.float()
    supervised = labels != IGNORED
    with torch.no_grad():
        p = logits.softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        if direction == "higher":
            dropped = p < tau[0]
        elif direction == "lower":
            dropped = p > tau[0]
        elif direction == "middle":
            dropped = ~((p >= tau[0]) & (p <= tau[1]))
        else:
            dropped = uniform < tau[0]
        mask = (supervised & ~dropped).float()
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    return (loss * mask).sum() / (mask.sum() if num_tokens is None else num_tokens)


def our_loss(logits, labels, direction, tau, uniform, num_tokens):
    options = {"prob_threshold": tau} if direction != "random" else {"keep_fraction": 1 - tau[0]}
    objective = build_objective("profit", threshold_direction=direction, **options)
    supervised = labels != IGNORED
    log_prob = logits.float().log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    output = objective(
        # The official code drops below tau, the keep ratio keeps below 1 - tau.
        TokenStatistics(log_prob[supervised], uniform=1 - uniform[supervised])
    )
    return output.loss.sum() / (output.weight.sum() if num_tokens is None else num_tokens)


@pytest.mark.parametrize("count_all", [True, False], ids=["all labels", "kept tokens"])
@pytest.mark.parametrize(("direction", "tau"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_equal_the_official_code(direction, tau, count_all, dtype):
    torch.manual_seed(7)
    num_tokens, vocab_size = 1021, 37
    logits = (3 * torch.randn(num_tokens, vocab_size)).to(dtype)
    labels = torch.randint(vocab_size, (num_tokens,))
    labels[torch.rand(num_tokens) < 0.2] = IGNORED
    uniform = torch.rand(num_tokens)
    count = int((labels != IGNORED).sum()) if count_all else None

    results = []
    for compute in (official_loss, our_loss):
        leaf = logits.clone().requires_grad_()
        loss = compute(leaf, labels, direction, tau, uniform, count)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    (official, official_grad), (ours, our_grad) = results
    torch.testing.assert_close(ours, official, rtol=1e-6, atol=0)
    torch.testing.assert_close(our_grad, official_grad, rtol=1e-5, atol=1e-9)
    assert official_grad.abs().sum() > 0


def compare_the_operation(hidden, weight, labels, direction, tau):
    """`linear_objective` and the official code on logits [N, V]: loss and both gradients."""
    options = {"prob_threshold": tau, "threshold_direction": direction}
    objective = build_objective("profit", **options)
    count = int((labels != IGNORED).sum())
    results = []
    for compute in ("official", "ours"):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        if compute == "official":
            loss = official_loss(leaves[0] @ leaves[1].t(), labels, direction, tau, None, count)
        else:
            loss = linear_objective(*leaves, labels, objective).loss.sum() / count
        loss.backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    official, ours = results
    torch.testing.assert_close(ours[0], official[0], rtol=1e-5, atol=0)
    for gradient, expected in zip(ours[1:], official[1:], strict=True):
        scale = expected.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(("direction", "tau"), [case for case in CASES if case[0] != "random"])
def test_the_operation_equals_the_official_code(direction, tau):
    torch.manual_seed(8)
    labels = torch.randint(507, (123,))
    labels[torch.rand(123) < 0.3] = IGNORED
    hidden = torch.randn(123, 252)
    weight = torch.randn(507, 252) / 5
    weight[labels[:60].clamp(min=0)] += hidden[:60] / 60  # some tokens are probable
    compare_the_operation(hidden, weight, labels, direction, tau)


@pytest.mark.parametrize("file", ["alpaca_en_demo.json", "s1k_gptoss20b_sharegpt_low.json"])
def test_the_operation_equals_the_official_code_on_real_text(shared_folder, tmp_path, file):
    """Real records and masks, Qwen3's vocabulary; the logits come from random hidden states and weights."""
    records = tmp_path / file
    records.write_text(json.dumps(json.loads((shared_folder / "data" / file).read_text())[:4]))
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(shared_folder / "qwen3-tokenizer"))
    examples, _ = build_examples([records], renderer, 192)
    row = next(iter(SFTDataset(examples, 192, 1, seed=0)))
    tokens, labels = row["tokens"], row["labels"]
    assert 0 < (labels != IGNORED).sum() < len(labels)
    torch.manual_seed(9)
    table = torch.randn(151936, 16)
    # The embedding of each token and the one before it: alike where the text repeats itself.
    hidden = table[tokens] + table[tokens.roll(1)] / 2
    weight = torch.randn(151936, 16) / 3
    supervised = labels != IGNORED
    p = torch.softmax(hidden[supervised] @ weight.t(), 1).gather(1, labels[supervised, None])
    compare_the_operation(hidden, weight, labels, "higher", [float(p.median()) * 1.001])
