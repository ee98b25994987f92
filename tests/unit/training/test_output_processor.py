"""The objective in the place of Megatron's output layer: models whose logits are no plain product."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from megatron_profit.objectives import build_objective
from megatron_profit.training.step import objective_loss
from megatron_profit.training.step.objective_loss import ObjectiveLoss

S, B, H, V = 3, 2, 8, 16
HIDDEN, WEIGHT, LABELS = torch.randn(S, B, H), torch.randn(V, H), torch.randint(V, (B, S))


@pytest.fixture
def token_loss(monkeypatch):
    """token_loss(scale, parts of the weight): the loss [B, S] of plain SFT."""
    args = SimpleNamespace(calculate_per_token_loss=True, iteration=0)
    monkeypatch.setattr(objective_loss, "get_args", lambda: args)

    def run(scale: float = 1.0, parts: int = 1) -> torch.Tensor:
        layer = SimpleNamespace(
            weight=WEIGHT[: V // parts],
            tp_group=SimpleNamespace(size=lambda: 1),
            sequence_parallel=False,
            gtp_remat_size=parts,
            _forward_pre_hooks={},
        )
        batch = ObjectiveLoss(build_objective("sft")).micro_batch()
        return batch.model_kwargs["output_processor"](
            hidden_states=HIDDEN,
            output_layer=layer,
            output_weight=None,
            labels=LABELS,
            loss_mask=None,
            scale_logits=lambda logits: scale * logits,
        )

    return run


def test_logits_are_scaled_before_the_softmax(token_loss):
    """As the ones of --use-mup."""
    logits = 0.25 * HIDDEN @ WEIGHT.t()
    expected = functional.cross_entropy(logits.permute(1, 2, 0), LABELS, reduction="none")
    torch.testing.assert_close(token_loss(scale=0.25), expected)


def test_a_part_of_the_weight_is_refused(token_loss):
    with pytest.raises(ValueError, match=r"--tensor-parallel-num-weight-shards .* into 2 parts"):
        token_loss(parts=2)
