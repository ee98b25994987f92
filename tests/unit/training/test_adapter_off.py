"""The frozen base of adapters as a reference: a pass where the objective reads it, and no other."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from megatron_profit.megatron_patches.callbacks import TrainContext
from megatron_profit.objectives import ScheduledObjective, build_objective
from megatron_profit.training.statistics import adapter_off
from megatron_profit.training.statistics.adapter_off import AdapterOffReference


@pytest.mark.parametrize(
    "objective",
    [build_objective("iw-sft"), build_objective("rho1", rank_scope="global_batch")],
    ids=["read by the step", "read by a look-ahead"],
)
@pytest.mark.parametrize("is_logged", [False, True])
def test_a_warm_up_makes_no_pass_unless_q_is_logged(monkeypatch, objective, is_logged):
    passes = []
    look = SimpleNamespace(
        of_next_batches=lambda *_: passes.append("step"),
        of_valid_batches=lambda *_: passes.append("evaluation") or [],
    )
    monkeypatch.setattr(adapter_off, "unwrap_model", list)
    monkeypatch.setattr(adapter_off, "adapters_off", nullcontext)
    schedule = ScheduledObjective(objective, warmup_steps=2)
    loss = SimpleNamespace(logged_statistics=frozenset({"ref_log_prob"} if is_logged else ()))
    reference = AdapterOffReference(loss, look)
    for step in range(3):
        loss.current_objective = schedule.at(step)
        reference.before_train_step(TrainContext([], None), step)
        reference.before_evaluation(TrainContext([], None))
    assert passes == ["step", "evaluation"] * (3 if is_logged else 1)
