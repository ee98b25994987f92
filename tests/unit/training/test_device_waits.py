"""Operations of a micro-batch for which a GPU has to be waited for: they read a number back from the device.

They are counted on a CPU, where they are the same operations.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from objective_options import every_objective
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_profit.objectives import OptionSchedule, ScheduledObjective, build_objective
from megatron_profit.ops import tiling
from megatron_profit.training.step import objective_loss
from megatron_profit.training.step.objective_loss import ObjectiveLoss
from megatron_profit.training.step.token_metrics import ProbQuantiles

B, S, H, V = 2, 40, 8, 64
ATEN = torch.ops.aten
READS = (
    *(ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN.is_nonzero),
    *(ATEN.bincount, ATEN.unique_consecutive, ATEN._unique2),
)
# Whether all labels are in the vocabulary (ops/validation.py), and the supervised rows (ops/rows.py).
FORWARD = {"_local_scalar_dense": 1, "nonzero": 1}
# The rows of nonzero weight besides (ops/autograd.py).
STEP = {"_local_scalar_dense": 1, "nonzero": 2}
BY_INDEX = (ATEN.index, ATEN.index_put, ATEN.index_put_)


class Waits(TorchDispatchMode):
    """Counts the operations that wait, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        by_mask = packet in BY_INDEX and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if packet in READS or by_mask:
            self.counts[packet.__name__ + (" by a mask" if by_mask else "")] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def step(monkeypatch):
    """step(objective, **options): the waits of a micro-batch, its backward pass included if there is one."""
    args = SimpleNamespace(
        calculate_per_token_loss=True,
        check_for_nan_in_loss_and_grad=False,
        check_for_spiky_loss=False,
        iteration=0,
        eval_iters=1,
        eval_global_batch_size=1,
        eval_micro_batch_size=1,
        data_parallel_size=1,
    )
    mpu = SimpleNamespace(
        get_tensor_model_parallel_rank=lambda: 0,
        get_data_parallel_world_size=lambda **_: 1,
        get_data_parallel_group=lambda **_: None,
    )
    monkeypatch.setattr(objective_loss, "get_args", lambda: args)
    monkeypatch.setattr(objective_loss, "mpu", mpu)
    monkeypatch.setattr(objective_loss, "get_num_microbatches", lambda: 1)
    monkeypatch.setattr(objective_loss, "get_rerun_state_machine", lambda: None)

    def run(objective, **options):
        torch.manual_seed(0)
        hidden = torch.randn(S, B, H, requires_grad=True)
        weight = torch.nn.Parameter(torch.randn(V, H))
        labels = torch.randint(V, (B, S))
        labels[:, ::3] = -100
        numbers = torch.arange(B * S).view(B, S)
        layer = SimpleNamespace(
            weight=weight,
            tp_group=SimpleNamespace(size=lambda: 1),
            sequence_parallel=False,
            _forward_pre_hooks={},
        )
        external = {name: -torch.rand(B, S) for name in ("ref_log_prob", "old_log_prob")}
        bounds = ("ref_lower_mass", "min_log_prob", "max_log_prob", "median_loss")
        external |= {name: torch.rand(B, S) for name in bounds}
        external["selected"] = torch.rand(B, S) < 0.5
        with Waits() as waits:
            batch = ObjectiveLoss(objective, **options).micro_batch(numbers, numbers, external)
            loss = batch.model_kwargs["output_processor"](
                hidden_states=hidden,
                output_layer=layer,
                output_weight=None,
                labels=labels,
                loss_mask=None,
                scale_logits=lambda logits: logits,
            )
            total, _, _ = batch.loss_func(loss)
            if total.requires_grad:
                total.backward()
        return waits.counts

    return run


@pytest.mark.parametrize("objective", every_objective(), ids=repr)
def test_a_step_waits_three_times(step, objective):
    assert step(objective) == STEP


@pytest.mark.parametrize("options", [{"log_entropy": True}, {"normalization": "kept"}])
def test_what_is_logged_takes_no_wait(step, options):
    psft = build_objective("psft")
    assert step(psft, prob_quantiles=ProbQuantiles((0.1, 0.5)), **options) == STEP
    schedule = OptionSchedule("clip_high", "linear", 0.1, 4)
    assert step(ScheduledObjective(psft, (schedule,)), **options) == STEP
    with torch.no_grad():
        assert step(psft, **options) == FORWARD


def test_a_backward_pass_that_keeps_some_rows_waits_once_more(step, monkeypatch):
    monkeypatch.setattr(tiling, "_KEPT_BYTES", {"cpu": 1})
    assert step(build_objective("sft")) == {**STEP, "index by a mask": 1}
    assert step(build_objective("sft"), backward="recompute") == STEP


def test_the_count_sees_what_it_forbids():
    vector = torch.arange(4.0)
    with Waits() as waits:
        vector[vector > 1].sum().item()
        vector[vector > 1] = torch.zeros(2)
        vector.masked_select(vector > 1)
    names = ("index by a mask", "index_put_ by a mask", "masked_select", "_local_scalar_dense")
    assert set(names) <= set(waits.counts)
