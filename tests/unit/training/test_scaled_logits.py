"""A model that scales its logits, as one of --use-mup does: the objective sees the scaled ones."""

from types import SimpleNamespace

import torch
from torch.nn import functional

from megatron_profit.objectives import build_objective
from megatron_profit.training.step import objective_loss
from megatron_profit.training.step.objective_loss import ObjectiveLoss

S, B, H, V = 3, 2, 8, 16


def test_logits_are_scaled_before_the_softmax(monkeypatch):
    args = SimpleNamespace(calculate_per_token_loss=True, iteration=0)
    monkeypatch.setattr(objective_loss, "get_args", lambda: args)
    hidden, weight, labels = torch.randn(S, B, H), torch.randn(V, H), torch.randint(V, (B, S))
    group = SimpleNamespace(size=lambda: 1)
    layer = SimpleNamespace(
        weight=weight, tp_group=group, sequence_parallel=False, _forward_pre_hooks={}
    )
    batch = ObjectiveLoss(build_objective("sft")).micro_batch()
    loss = batch.model_kwargs["output_processor"](
        hidden_states=hidden,
        output_layer=layer,
        output_weight=None,
        labels=labels,
        loss_mask=None,
        scale_logits=lambda logits: 0.25 * logits,
    )
    logits = 0.25 * hidden @ weight.t()
    expected = functional.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")
    torch.testing.assert_close(loss, expected)
