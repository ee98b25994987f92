"""ProFit against the computation of its official code, restated here in a few lines of plain torch."""

import pytest
import torch

from megatron_profit.objectives import TokenStatistics, build_objective

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
    options = {"prob_threshold": tau} if direction != "random" else {"keep_ratio": 1 - tau[0]}
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
