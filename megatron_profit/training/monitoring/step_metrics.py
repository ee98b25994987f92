"""Sums and counts of the loss function's metrics: over micro-batches and ranks, then over steps.

They are divided only when a value is shown. So the value of an interval is the mean over all its tokens,
whatever number each step had. This also holds for metrics that only some of the steps report. For example,
steps with 10 and 30 tokens and means 1 and 2 give (10 + 60) / 40 = 1.75.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

SumAndCount = tuple[float, float]


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of a step.

    Attributes:
        names: Names of the metrics.
        local: [micro-batches, metrics, 2] float64, sum and count on this rank.
        total: [metrics, 2] float64, over the micro-batches of all ranks.
    """

    names: tuple[str, ...]
    local: Tensor
    total: Tensor

    @classmethod
    def reduce(
        cls, losses: Sequence[Mapping[str, Tensor]], group: dist.ProcessGroup | None
    ) -> StepMetrics:
        """Add up [sum, count] pairs with one collective.

        Args:
            losses: Metrics of each micro-batch, by name; the same names in all.
            group: Ranks that share the step's tokens.

        Raises:
            ValueError: A value is no pair.
        """
        names = tuple(losses[0])
        for name in names:
            if losses[0][name].numel() != 2:
                raise ValueError(f"metric {name!r} is {losses[0][name]}, not a sum with a count")
        local = torch.stack(
            [torch.stack([x[name].view(2).double() for name in names]) for x in losses]
        )
        total = local.sum(0)
        if group is not None:
            dist.all_reduce(total, group=group)
        return cls(names, local, total)

    def means(self) -> dict[str, Tensor]:
        """Return each metric as a scalar in fp32."""
        return dict(zip(self.names, (self.total[:, 0] / self.total[:, 1]).float(), strict=True))

    def pairs(self) -> dict[str, SumAndCount]:
        """Return each metric over all ranks, read back from the device."""
        return {n: (s, c) for n, (s, c) in zip(self.names, self.total.tolist(), strict=True)}

    def over_rows(self, group: dist.ProcessGroup) -> StepMetrics:
        """Return the metrics with micro-batches summed over ranks that hold parts of the same rows."""
        local = self.local.clone()
        dist.all_reduce(local, group=group)
        return replace(self, local=local)

    def local_values(self, name: str) -> list[float]:
        """Return the mean of a metric in each micro-batch of this rank."""
        pairs = self.local[:, self.names.index(name)]
        return (pairs[:, 0] / pairs[:, 1]).tolist()


@dataclass
class Interval:
    """The steps since the last log line.

    Attributes:
        steps, skipped: All steps, and the steps among them in which the optimizer took no step.
        tokens: Tokens of records, without padding.
        floating_point_operations: By Megatron's count.
    """

    steps: int = 0
    skipped: int = 0
    tokens: float = 0.0
    floating_point_operations: float = 0.0
    _module_losses: dict[str, Tensor] = field(default_factory=dict)
    _pairs: dict[str, SumAndCount] = field(default_factory=dict)

    def add(self, pairs: Mapping[str, SumAndCount], *, skipped: bool) -> None:
        """Count a step; the metrics of a skipped one are left out, because it trained no token."""
        self.steps += 1
        self.skipped += skipped
        if skipped:
            return
        for name, (total, count) in pairs.items():
            before = self._pairs.get(name, (0.0, 0.0))
            self._pairs[name] = (before[0] + total, before[1] + count)

    def add_module_losses(self, losses: Mapping[str, Tensor], *, skipped: bool) -> None:
        """Count the losses that the model's modules add by themselves, of a step that `add` has counted."""
        if skipped:
            return
        for name, loss in losses.items():
            self._module_losses[name] = self._module_losses.get(name, 0) + loss

    def module_means(self) -> dict[str, float]:
        """Return the mean over the steps of each loss of the model's modules."""
        made = self.steps - self.skipped
        return {name: float(total) / made for name, total in self._module_losses.items()}

    def means(self) -> dict[str, float]:
        """Return each metric of the interval, in the order in which they appeared."""
        return {name: total / count for name, (total, count) in self._pairs.items()}

    def total(self, name: str) -> SumAndCount:
        """Return the sum and count of a metric; zeros where no step reported it."""
        return self._pairs.get(name, (0.0, 0.0))
