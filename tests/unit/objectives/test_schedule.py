"""Objectives that change over the steps of a run."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_profit.objectives import (
    Objective,
    OptionSchedule,
    ScheduledObjective,
    TokenStatistics,
    build_objective,
)

PROFIT = build_objective("profit", prob_threshold=0.5, threshold_direction="higher")
MIDDLE = build_objective("profit", prob_threshold=(0.2, 0.6), threshold_direction="middle")


def thresholds(*schedule, objective=PROFIT, warmup=0, steps=range(6)):
    scheduled = ScheduledObjective(objective, (OptionSchedule(*schedule),), warmup)
    return [getattr(scheduled.at(step), "prob_threshold", None) for step in steps]


def test_shapes():
    assert thresholds("prob_threshold", "linear", 0.1, 4) == [
        (pytest.approx(tau),) for tau in (0.1, 0.2, 0.3, 0.4, 0.5, 0.5)
    ]
    assert thresholds("prob_threshold", "constant", "0.1", "3") == [
        (tau,) for tau in (0.1, 0.1, 0.1, 0.5, 0.5, 0.5)
    ]
    half = 0.5 - 0.4 * (1 + math.cos(math.pi / 4)) / 2
    assert thresholds("prob_threshold", "cosine", 0.1, 4)[:3] == [
        (0.1,),
        (pytest.approx(half),),
        (pytest.approx(0.3),),
    ]


@given(
    shape=st.sampled_from(["constant", "linear", "cosine"]),
    start=st.floats(0, 1).filter(lambda start: start != 0.5),
    steps=st.integers(1, 50),
)
def test_a_schedule_goes_from_its_start_to_the_option_and_no_further(shape, start, steps):
    values = [tau for (tau,) in thresholds("prob_threshold", shape, start, steps, steps=range(60))]
    assert values[0] == start
    assert set(values[steps:]) == {0.5}, "the option itself, to the bit"
    low, high = sorted((start, 0.5))
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in values)
    assert values == sorted(values, reverse=start > 0.5)


def test_two_thresholds_move_together():
    moved = thresholds("prob_threshold", "linear", "0,1", 2, objective=MIDDLE, steps=range(3))
    assert moved == [(0.0, 1.0), (pytest.approx(0.1), pytest.approx(0.8)), (0.2, 0.6)]


def test_a_warm_up_comes_first_and_delays_the_schedule():
    objectives = ScheduledObjective(
        PROFIT, (OptionSchedule("prob_threshold", "linear", 0.1, 2),), warmup_steps=2
    )
    assert [objectives.at(step).name for step in range(5)] == ["sft"] * 2 + ["profit"] * 3
    assert thresholds("prob_threshold", "linear", 0.1, 2, warmup=2, steps=(2, 4)) == [
        (0.1,),
        (0.5,),
    ]
    assert ScheduledObjective(PROFIT, warmup_steps=1).at(1) is PROFIT


def test_without_a_step_it_is_the_objective_at_the_end():
    statistics = TokenStatistics(torch.tensor([0.4, 0.6]).log())
    schedule = (OptionSchedule("prob_threshold", "linear", 0.1, 2),)
    objectives = ScheduledObjective(PROFIT, schedule, warmup_steps=2)
    assert isinstance(objectives, Objective)
    assert objectives.final is objectives.for_evaluation() is PROFIT
    assert objectives(statistics).weight.tolist() == [0, 1]
    assert objectives.at(2)(statistics).weight.tolist() == [1, 1]
    proximal = ScheduledObjective(build_objective("psft"), warmup_steps=2)
    assert proximal.for_evaluation().name == "sft"


def test_an_objective_that_changes_by_itself_still_does():
    """It begins after the warm-up, as a schedule of its options does."""

    @dataclass(frozen=True)
    class Own(type(PROFIT)):
        steps: int = 0

        def at(self, step):
            return replace(self, steps=step)

    own = Own(prob_threshold=0.1, threshold_direction="higher")
    assert ScheduledObjective(own).at(7).steps == 7
    assert ScheduledObjective(own, warmup_steps=2).at(7).steps == 5
    schedule = (OptionSchedule("prob_threshold", "linear", 0.0, 10),)
    scheduled = ScheduledObjective(own, schedule).at(5)
    assert (scheduled.steps, scheduled.prob_threshold) == (5, (0.05,))


def test_any_fractional_option_can_have_a_schedule():
    schedule = (OptionSchedule("keep_fraction", "linear", 1.0, 10),)
    objectives = ScheduledObjective(build_objective("entropy", rank_scope="global_batch"), schedule)
    assert objectives.at(5).keep_fraction == pytest.approx(0.6)
    assert objectives.required_statistics == {"selected"}
    assert objectives.lookahead == {"selected": {"entropy"}}
    assert objectives.needed_statistics == {"selected", "entropy"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("prob_threshold", "square", 0, 3),
            "the schedule of prob_threshold is 'square'; set it to",
        ),
        (("prob_threshold", "linear", 0, 0), "steps in the schedule of prob_threshold 0 is not a"),
        (("prob_threshold", "linear", 0, 2.5), r"is 2\.5; give a whole number"),
        (
            ("prob_threshold", "linear", "x", 2),
            "the start of the schedule of prob_threshold 'x' is",
        ),
        (("prob_threshold", "linear", 1.5, 2), r"prob_threshold 1\.5 is not a number in \[0, 1\]"),
        (("prob_threshold", "linear", "0,1", 2), r"starts at 2 value\(s\), but the option has 1"),
        (
            ("keep_fraction", "linear", 0, 2),
            r"keep_fraction cannot have a schedule here: .* has prob_threshold\.$",
        ),
        (("tau", "linear", 0, 2), "tau cannot have a schedule here"),
        (("threshold_direction", "linear", 0, 2), "threshold_direction cannot have a schedule"),
        (
            ("prob_threshold", "linear", "0.5", 2),
            r"prob_threshold starts where it ends, at \(0\.5,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScheduledObjective(PROFIT, (OptionSchedule(*arguments),))


def test_warm_ups_and_schedules_without_effect_are_refused():
    schedule = OptionSchedule("prob_threshold", "linear", 0.1, 2)
    with pytest.raises(ValueError, match="prob_threshold has two schedules"):
        ScheduledObjective(PROFIT, (schedule, schedule))
    with pytest.raises(ValueError, match="warm-up of plain SFT changes nothing"):
        ScheduledObjective(build_objective("sft"), warmup_steps=3)
    with pytest.raises(ValueError, match="the warm-up is -1 steps"):
        ScheduledObjective(PROFIT, warmup_steps=-1)
