"""The guards: what they object to, what they let pass, and what they answer."""

from __future__ import annotations

import argparse
import math

import pytest

from megatron_profit.flags import add_flags, options_of
from megatron_profit.training.monitoring.guards import (
    GuardOptions,
    Guards,
    Spikes,
    StepFacts,
)

GOOD = {"loss": 2.0, "finite_loss": True, "supervised": 100, "kept": 80, "grad_norm": 1.0}


def facts(**changes) -> StepFacts:
    return StepFacts(**{**GOOD, **changes})


def kinds(events):
    return [(event.kind, event.policy) for event in events]


def after(steps: int, **options) -> Guards:
    """Guards that have seen some ordinary steps."""
    guards = Guards(GuardOptions(**options))
    for _ in range(steps):
        assert guards.judge(facts()) == []
    return guards


def test_flags_and_options_are_the_same():
    parser = argparse.ArgumentParser()
    add_flags(parser, GuardOptions)
    assert options_of(GuardOptions, vars(parser.parse_args([]))) == GuardOptions()
    given = parser.parse_args("--on-spike skip --spike-loss 2.5 --stall-steps 7".split())
    expected = GuardOptions(on_spike="skip", spike_loss=2.5, stall_steps=7)
    assert options_of(GuardOptions, vars(given)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_nonfinite": "warn"}, "--on-nonfinite is 'warn'; choose one of skip, stop"),
        ({"spike_loss": 0.5}, r"--spike-loss is 0.5; it must be a multiple above 1"),
        ({"spike_grad_norm": math.nan}, "--spike-grad-norm is nan"),
        ({"stall_steps": 0}, "--stall-steps is 0; it must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GuardOptions(**options)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"finite_loss": False}, "non-finite loss"),
        ({"finite_loss": False, "grad_norm": None}, "non-finite loss"),
        ({"grad_norm": math.nan}, "non-finite gradient"),
        ({"grad_norm": math.inf}, "non-finite gradient"),
        ({"rejected_fatal": True}, "non-finite gradient"),
    ],
)
@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_what_is_not_finite_is_an_event_from_the_first_step_on(changes, kind, policy):
    guards = Guards(GuardOptions(on_nonfinite=policy))
    assert kinds(guards.judge(facts(**changes))) == [(kind, policy)]


def test_an_overflow_of_the_loss_scaler_is_no_event():
    """It leaves the step out and finds no gradient norm, while the loss, which it does not scale, is good."""
    assert Guards(GuardOptions()).judge(facts(grad_norm=None)) == []


def test_a_batch_without_supervised_tokens():
    event = Guards(GuardOptions()).judge(facts(supervised=0, kept=0, grad_norm=0.0, loss=0.0))
    assert kinds(event) == [("empty batch", "skip")]


def test_spikes_are_judged_by_the_median_of_recent_steps():
    guards = after(16)
    assert guards.judge(facts(loss=5.9, grad_norm=9.9)) == []
    events = guards.judge(facts(loss=6.2, grad_norm=11.0))
    assert kinds(events) == [("spike", "warn"), ("spike", "warn")]
    assert "cross-entropy is 6.2, 3.1 times the median 2" in events[0].text
    assert "gradient norm is 11, 11 times the median 1" in events[1].text


def test_the_first_steps_are_no_spikes_and_zero_factors_switch_off():
    assert after(15).judge(facts(loss=100.0, grad_norm=100.0)) == []
    off = after(30, spike_loss=0.0, spike_grad_norm=0.0)
    assert off.judge(facts(loss=100.0, grad_norm=100.0)) == []


def test_what_stays_high_is_no_spike_for_ever():
    spikes = Spikes(3.0, window=8, least=4)
    assert [spikes.add(1.0) for _ in range(8)] == [None] * 8
    found = [spikes.add(9.0) for _ in range(8)]
    assert found == [1.0] * 4 + [None] * 4
    assert spikes.add(0.0) is None
    assert spikes.add(math.nan) is None
    assert list(spikes.recent) == [9.0] * 8, "what is not above 0 is not remembered"


def test_a_rejection_of_megatrons_checks_is_a_spike():
    assert kinds(Guards(GuardOptions()).judge(facts(rejected=True))) == [("spike", "warn")]


def test_steps_that_train_nothing_are_counted_in_a_row():
    guards = Guards(GuardOptions(stall_steps=3, on_stall="stop"))

    def finish(**step):
        return kinds(guards.finish(facts(**step.get("changes", {})), updated=step["updated"]))

    nothing_kept = {"updated": True, "changes": {"kept": 0}}
    assert [finish(**nothing_kept) for _ in range(2)] == [[], []]
    assert finish(updated=True) == [], "and it begins anew"
    assert [finish(**nothing_kept), finish(updated=False)] == [[], []]
    assert finish(updated=False) == [("stall", "stop")]
    assert [finish(updated=False) for _ in range(3)] == [[], [], [("stall", "stop")]]
