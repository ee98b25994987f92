"""An example of a user's statistic: how frequent each target token is in the training data.

`own_objective:RareTokens` names this class as its provider. Only a training run imports this file, so the
objective itself works without Megatron.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_profit.training.statistics.external_statistics import RunParts, StatisticProvider
from megatron_profit.training.step.batch import Batch


class TargetFrequency(StatisticProvider):
    """Gives `target_frequency`.

    Args:
        frequency: [V] float32, the share of each vocabulary entry among the supervised tokens of the data.
    """

    statistic = "target_frequency"

    def __init__(self, frequency: torch.Tensor) -> None:
        self._frequency = frequency

    @classmethod
    def from_run(cls, run: RunParts) -> TargetFrequency:
        """Count the supervised tokens of the training data."""
        examples = run.datasets["train"].examples
        targets = examples.ids[np.asarray(examples.supervised) != 0]
        counts = torch.from_numpy(np.bincount(targets, minlength=run.args.vocab_size))
        return cls((counts / counts.sum().clamp(min=1)).float())

    def of(self, batch: Batch, data: str) -> torch.Tensor:
        """Return [B, S] for rows of either data set; 0 for a target that the training data lack."""
        self._frequency = self._frequency.to(batch.labels.device)
        return self._frequency[batch.labels.clamp(min=0)]
