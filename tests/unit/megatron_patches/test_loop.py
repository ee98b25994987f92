"""The line of an evaluation, the losses of experts, and who is asked before an update."""

from __future__ import annotations

import pytest

from megatron_profit.megatron_patches.callbacks import Callback, register
from megatron_profit.megatron_patches.loop import (
    _ask_before_updates,
    _Reports,
    evaluation_line,
)


def test_only_the_cross_entropy_has_a_perplexity():
    metrics = {"objective": 5.0, "lm loss": 6.0, "p quantile 0.1": 0.1}
    assert evaluation_line("iteration 2", metrics) == (
        " validation loss at iteration 2 | objective value: 5.000000E+00 | lm loss value: 6.000000E+00 | "
        "lm loss PPL: 4.034288E+02 | p quantile 0.1 value: 1.000000E-01 | "
    )
    assert "lm loss PPL: 4.851652E+08" in evaluation_line("iteration 2", {"lm loss": 900.0})


class Tracker:
    """Megatron's tracker of experts: it adds to the sums that it is given."""

    def report(self, iteration, total_loss_dict):
        total_loss_dict["load_balancing_loss"] = 1.5
        return f"of step {iteration}"


def test_the_losses_of_experts_are_taken_as_numbers():
    sums = {"load_balancing_loss": 7.0}
    reports = _Reports(Tracker())
    assert reports.report(iteration=3, total_loss_dict=sums) == "of step 3"
    assert reports.losses == {"load_balancing_loss": 1.5}
    assert sums == {"load_balancing_loss": 7.0}


class Optimizer:
    """The order of calls of Megatron's ChainedOptimizer."""

    updates = 0

    def get_grad_norm(self) -> float:
        return 2.5

    def step_with_ready_grads(self) -> bool:
        self.updates += 1
        return True

    def step(self) -> bool:
        self.get_grad_norm()
        return self.step_with_ready_grads()


@pytest.mark.parametrize("allowed", [True, False])
def test_callbacks_decide_on_an_update_by_the_norm(allowed):
    class Judge(Callback):
        def allows_update(self, grad_norm):
            assert grad_norm == 2.5
            return allowed

    optimizer = Optimizer()
    _ask_before_updates(optimizer)
    _ask_before_updates(optimizer)
    register(Callback(), Judge())
    try:
        assert optimizer.step() is allowed
    finally:
        register()
    assert optimizer.updates == allowed
    assert optimizer.step(), "without callbacks every update is made"
