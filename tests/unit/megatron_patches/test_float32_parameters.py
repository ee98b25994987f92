"""An optimizer of a bf16 model that has fp32 parameters, as its checkpoints see it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_profit.megatron_patches.optimizer.float32_parameters import all_as_float16


def optimizer() -> SimpleNamespace:
    """Two groups, as Megatron holds them: in the second one, an fp32 parameter lies between two others."""
    halves = [torch.full((2,), float(i), dtype=torch.bfloat16) for i in range(3)]
    copies = [half.float() for half in halves]
    decay = torch.full((2,), 9.0)
    groups = [{"params": copies[:1]}, {"params": [copies[1], decay, copies[2]]}]
    return SimpleNamespace(
        float16_groups=[halves[:1], halves[1:]],
        fp32_from_float16_groups=[copies[:1], copies[1:]],
        optimizer=SimpleNamespace(param_groups=groups),
    )


def values(groups: list[list[torch.Tensor]]) -> list[list[float]]:
    return [[tensor[0].item() for tensor in group] for group in groups]


def test_parameters_are_counted_in_the_order_of_the_optimizer():
    own = optimizer()
    before = own.float16_groups, own.fp32_from_float16_groups
    with all_as_float16(own):
        assert values(own.float16_groups) == [[0.0], [1.0, 9.0, 2.0]]
        assert values(own.fp32_from_float16_groups) == [[0.0], [1.0, 9.0, 2.0]]
        half, decay, _ = own.float16_groups[1]
        assert half.dtype == torch.bfloat16
        assert decay is own.fp32_from_float16_groups[1][1], "its own copy"
    assert (own.float16_groups, own.fp32_from_float16_groups) == before


def test_a_failed_save_leaves_the_groups_as_they_were():
    own = optimizer()
    before = own.float16_groups
    with pytest.raises(OSError, match="disk"), all_as_float16(own):
        raise OSError("disk full")
    assert own.float16_groups is before
