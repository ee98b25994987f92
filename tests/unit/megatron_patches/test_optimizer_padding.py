"""What the distributed optimizer saves in the gaps between parameters."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

distrib_optimizer = pytest.importorskip("megatron.core.optimizer.distrib_optimizer")

from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402

from megatron_profit.megatron_patches import megatron as patches  # noqa: E402

KEYS = ("param", "exp_avg", "exp_avg_sq")


def optimizer() -> SimpleNamespace:
    """One rank's bucket of 12 numbers, in which two parameters have [2, 5) and [7, 9)."""

    def states() -> dict:
        spans = ((2, 5), (7, 9))
        bucket = [
            {
                **{key: torch.ones(end - start) for key in KEYS},
                "gbuf_local_start": start,
                "gbuf_local_end": end,
            }
            for start, end in spans
        ]
        return {
            "per_bucket_numel": [],
            "per_bucket_numel_unpadded": [],
            0: {torch.float32: [bucket]},
        }

    bucket = SimpleNamespace(numel_unpadded=12, grad_data=torch.zeros(12))
    return SimpleNamespace(
        data_parallel_group=SimpleNamespace(rank=lambda: 0, size=lambda: 1),
        data_parallel_group_idx=0,
        distributed_optimizer_instance_id=0,
        gbuf_ranges=[None],
        buffers=[SimpleNamespace(buckets=[bucket])],
        get_parameter_state_dp_reshardable=states,
    )


def saved(sharded_state: dict) -> dict[str, torch.Tensor]:
    """The whole of each tensor that goes into the checkpoint."""
    whole = {key: torch.full((12,), torch.nan) for key in KEYS}
    for tensors in sharded_state[0][torch.float32][0]:
        for key in KEYS:
            part = tensors[key]
            assert isinstance(part, ShardedTensor)
            (start,), (size,) = part.global_offset, part.local_shape
            whole[key][start : start + size] = part.data
    return whole


def test_gaps_are_zero(monkeypatch):
    cls = distrib_optimizer.DistributedOptimizer
    name = "sharded_param_state_dp_reshardable"
    monkeypatch.setattr(cls, name, getattr(cls, name))

    def leftovers(*size: int, **options: object) -> torch.Tensor:
        return torch.full(size, 7.0)

    monkeypatch.setattr(distrib_optimizer.torch, "empty", leftovers)
    before = saved(getattr(cls, name)(optimizer(), None))
    assert before["param"].tolist() == [7, 7, 1, 1, 1, 7, 7, 1, 1, 7, 7, 7]
    patches._save_zeros_as_padding()
    after = saved(getattr(cls, name)(optimizer(), None))
    for key in KEYS:
        assert after[key].tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0]
