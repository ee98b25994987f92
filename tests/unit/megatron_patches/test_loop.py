"""What is read from and taken out of Megatron's lines, and who is asked before an update."""

from __future__ import annotations

import pytest

from megatron_profit.megatron_patches.callbacks import Callback, register
from megatron_profit.megatron_patches.loop import (
    _ask_before_updates,
    _WithoutPerplexities,
    fields_of_line,
    without_perplexities,
)

LINE = (
    " [2026-11-20 10:00:00.000000] iteration       12/     600 | consumed samples:           96 |"
    " elapsed time per iteration (ms): 91.5 | learning rate: 1.000000E-03 | global batch size:     8 |"
    " load_balancing_loss: 1.0E+00 | loss scale: 1.0 | grad norm: nan |"
    " number of skipped iterations:   0 |"
)


def test_the_numbers_of_a_line_are_found_by_name():
    fields = fields_of_line(LINE)
    assert str(fields.pop("grad norm")) == "nan"
    assert fields == {
        "consumed samples": 96,
        "elapsed time per iteration (ms)": 91.5,
        "learning rate": 1e-3,
        "global batch size": 8,
        "load_balancing_loss": 1,
        "loss scale": 1,
        "number of skipped iterations": 0,
    }


def test_only_the_cross_entropy_has_a_perplexity():
    line = (
        " validation loss at iteration 2 | objective value: 5.0E+00 | objective PPL: 1.4E+02 | "
        "lm loss value: 6.0E+00 | lm loss PPL: 4.0E+02 | p quantile 0.1 value: 1E-01 | "
        "p quantile 0.1 PPL: 1.1E+00 | "
    )
    assert without_perplexities(line) == (
        " validation loss at iteration 2 | objective value: 5.0E+00 | lm loss value: 6.0E+00 | "
        "lm loss PPL: 4.0E+02 | p quantile 0.1 value: 1E-01 | "
    )
    assert set(without_perplexities("-" * 500)) == {"-"}


def test_tensorboard_gets_no_other_perplexity():
    class Writer:
        def __init__(self):
            self.tags = []

        def add_scalar(self, tag, value, step):
            self.tags.append(tag)

    writer = Writer()
    filtered = _WithoutPerplexities(writer)
    for name in ("lm loss", "mean p"):
        for ending in ("", " vs samples", " ppl", " ppl vs samples"):
            filtered.add_scalar(f"{name} validation{ending}", 0.0, 1)
    assert filtered.tags is writer.tags
    expected = [f"lm loss validation{e}" for e in ("", " vs samples", " ppl", " ppl vs samples")]
    assert writer.tags == [*expected, "mean p validation", "mean p validation vs samples"]


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
