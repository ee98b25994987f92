"""An objective that changes over the steps of a run: options on a schedule, after plain SFT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from megatron_profit.objectives.base import Objective, ObjectiveOutput, TokenStatistics
from megatron_profit.objectives.checks import flatten, number_in, one_of
from megatron_profit.objectives.sft import SFT

if TYPE_CHECKING:
    from torch import Tensor

SCHEDULE_SHAPES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class OptionSchedule:
    """Takes an option from ``start`` to its final value, which it has from ``steps`` on.

    For example, a linear schedule from 0 over 100 steps to 0.1 gives 0.05 at step 50.

    Attributes:
        option: name of an option that is a float or a tuple of floats.
        shape: linear, cosine (half a period), or constant (``start`` until the end).
        start: the option's value at step 0, in any form that the option takes.
        steps: 1 or more.

    Raises:
        ValueError: an unknown shape, or a number out of range.
    """

    option: str
    shape: str
    start: Any
    steps: int

    def __post_init__(self) -> None:
        one_of(f"the schedule of {self.option}", self.shape, SCHEDULE_SHAPES)
        name = f"the number of steps in the schedule of {self.option}"
        steps = number_in(name, self.steps, 1)
        if not steps.is_integer():
            raise ValueError(f"{name} is {self.steps!r}; give a whole number.")
        start = tuple(
            number_in(f"the start of the schedule of {self.option}", value, -math.inf)
            for value in flatten(self.start)
        )
        object.__setattr__(self, "steps", int(steps))
        object.__setattr__(self, "start", start)

    def value(self, step: int, end: float) -> float:
        """Return the option at a step, counted from 0; ``end`` is its final value."""
        return self._between(step, self.start[0], end)

    def values(self, step: int, end: tuple[float, ...]) -> tuple[float, ...]:
        """Return ``value`` of an option that is a tuple."""
        pairs = zip(self.start, end, strict=True)
        return tuple(self._between(step, one, other) for one, other in pairs)

    def _between(self, step: int, start: float, end: float) -> float:
        if step >= self.steps:
            return end
        progress = step / self.steps
        if self.shape == "constant":
            progress = 0.0
        elif self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return start + (end - start) * progress


@dataclass(frozen=True)
class ScheduledObjective(Objective):
    """An objective for each step of a run, which `at` gives. Without a step it is the one at the end.

    Attributes:
        objective: the objective at the end of the schedules.
        schedules: at most one for each of its options.
        warmup_steps: steps of plain SFT at the beginning; the schedules begin after them.

    Raises:
        ValueError: a schedule that does not fit the objective or has no effect, or a negative
            warm-up.
    """

    objective: Objective
    schedules: tuple[OptionSchedule, ...] = ()
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"the warm-up is {self.warmup_steps} steps; give 0 or more.")
        if self.warmup_steps and isinstance(self.objective, SFT):
            raise ValueError("a warm-up of plain SFT changes nothing before plain SFT; remove it.")
        names = [schedule.option for schedule in self.schedules]
        for schedule in self.schedules:
            if names.count(schedule.option) > 1:
                raise ValueError(f"the option {schedule.option} has two schedules; keep one.")
            self._check(schedule)
        self.at(self.warmup_steps)  # builds the objective with the first values, which checks them

    def _check(self, schedule: OptionSchedule) -> None:
        known = {field.name for field in fields(self.objective)}
        end = getattr(self.objective, schedule.option) if schedule.option in known else None
        count = len(end) if isinstance(end, tuple) else 1
        if not (isinstance(end, float) or (isinstance(end, tuple) and count)):
            can = [
                n for n in sorted(known) if isinstance(getattr(self.objective, n), (float, tuple))
            ]
            raise ValueError(
                f"{schedule.option} cannot have a schedule here: it is no fractional option that is "
                f"set; this objective has {', '.join(can) or 'none'}."
            )
        if len(schedule.start) != count:
            raise ValueError(
                f"the schedule of {schedule.option} starts at {len(schedule.start)} value(s), but the "
                f"option has {count}."
            )
        if schedule.start == (end if isinstance(end, tuple) else (end,)):
            raise ValueError(
                f"the schedule of {schedule.option} starts where it ends, at {end!r}; it changes "
                "nothing: remove it, or give another start."
            )

    @property
    def required_statistics(self) -> frozenset[str]:
        """The statistics that at least one of the steps needs."""
        return self.objective.required_statistics

    @property
    def lookahead(self) -> Mapping[str, frozenset[str]]:
        return self.objective.lookahead

    @property
    def final(self) -> Objective:
        return self.objective.final

    def look_ahead(self, statistics: TokenStatistics) -> Mapping[str, Tensor]:
        return self.objective.look_ahead(statistics)

    def for_evaluation(self) -> Objective:
        return self.objective.for_evaluation()

    def evaluate(self, statistics: TokenStatistics) -> ObjectiveOutput:
        return self.objective.evaluate(statistics)

    def metrics(self, statistics: TokenStatistics) -> Mapping[str, tuple[Tensor, Tensor]]:
        return self.objective.metrics(statistics)

    def at(self, step: int) -> Objective:
        """Return the objective of a step, counted from 0.

        An objective's own `at` begins after the warm-up, as the schedules do.
        """
        if step < self.warmup_steps:
            return SFT()
        step -= self.warmup_steps
        values: dict[str, float | tuple[float, ...]] = {}
        for schedule in self.schedules:
            end = getattr(self.objective, schedule.option)
            evaluate = schedule.values if isinstance(end, tuple) else schedule.value
            values[schedule.option] = evaluate(step, end)
        objective = replace(self.objective, **values) if values else self.objective
        return objective.at(step)
