"""Totals of a run: the tokens that all its steps have trained, and the metrics of its last log line.

Checkpoints hold them, so that a resumed run goes on counting, and the model card of an export shows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeGuard

import torch.distributed as dist


@dataclass
class RunTotals:
    """Sums over the steps of a run; all ranks have the same.

    Attributes:
        step: Steps that are done.
        since: Steps before the first one that was counted; above 0 if the run resumed from a checkpoint
            without totals.
        tokens: Tokens of records, without padding.
        supervised_tokens, kept_tokens: Tokens in the loss, and tokens among them that the objective kept.
            Steps without an update count in neither.
        last: Metrics of the last log line, by name.
        last_steps: First and last step of that line.
    """

    step: int = 0
    since: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    kept_tokens: int = 0
    last: dict[str, float] = field(default_factory=dict)
    last_steps: list[int] = field(default_factory=list)

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Go on from the totals that the checkpoint of `step` holds; without whole ones, count from there.

        The metrics of the last log line come back too: a run that has no step left prints no other line.
        """
        counts = {name: saved.get(name) for name in ("since", *_COUNTS)}
        if any(type(count) is not int for count in counts.values()):
            self.since = step
            return
        vars(self).update(counts)
        last, steps = saved.get("last"), saved.get("last_steps")
        if _are_metrics(last) and _are_steps(steps):
            self.last, self.last_steps = dict(last), list(steps)

    def add(self, *, tokens: float, supervised: float, kept: float) -> None:
        """Count the tokens of a step in which the weights changed."""
        self.tokens += round(tokens)
        self.supervised_tokens += round(supervised)
        self.kept_tokens += round(kept)

    def note_line(self, metrics: Mapping[str, float], first: int, last: int) -> None:
        """Keep the metrics of a log line about the steps `first` to `last`."""
        self.last = {n: float(v) for n, v in metrics.items() if math.isfinite(v)}
        self.last_steps = [first, last]

    def share(self) -> None:
        """Give all ranks the metrics of the last line, which the last stage alone has. A collective."""
        everyone = [self.last]
        dist.broadcast_object_list(everyone, src=dist.get_world_size() - 1)
        self.last = everyone[0]

    def to_json(self) -> dict[str, Any]:
        """Return the totals as JSON values, for a checkpoint that names its step by itself."""
        return {name: value for name, value in asdict(self).items() if name != "step"}


def _are_metrics(value: Any) -> TypeGuard[Mapping[str, float]]:
    return isinstance(value, Mapping) and all(type(number) is float for number in value.values())


def _are_steps(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and [type(step) for step in value] == [int, int]


_COUNTS = ("tokens", "supervised_tokens", "kept_tokens")
