"""Warns when the objective keeps almost no token, so that the run trains almost no token."""

from __future__ import annotations

import torch

from checkpoint_conversion.errors import warn

# Micro-batches until the first check.
_FIRST_WINDOW = 4
# The share of kept tokens below which it warns.
_LEAST_KEPT = 0.01


class KeptFractionMonitor:
    """Watches the share of supervised tokens that the objective keeps on this rank.

    It reads the counts back after 4 micro-batches, then after 8, 16 and so on. So a GPU hardly ever waits,
    and a long run prints few warnings.
    """

    def __init__(self) -> None:
        self._window = _FIRST_WINDOW
        self._micro_batches = 0
        self._counts: torch.Tensor | None = None

    def add(self, num_kept: torch.Tensor, num_supervised: torch.Tensor) -> None:
        """Count one micro-batch; warn at the end of a window in which too little was kept."""
        counts = torch.stack([num_kept, num_supervised])
        self._counts = counts if self._counts is None else self._counts + counts
        self._micro_batches += 1
        if self._micro_batches < self._window:
            return
        kept, supervised = self._counts.tolist()
        if supervised and kept < _LEAST_KEPT * supervised:
            warn(
                f"the objective kept {kept} of the last {supervised} supervised tokens on this rank "
                f"(under {_LEAST_KEPT:.0%}), so this run trains almost nothing. A model that was never "
                "trained gives every token a small probability: start from a base model or from plain "
                "SFT (--objective sft), or choose other options of the objective, such as --prob-threshold"
            )
        self._window, self._micro_batches, self._counts = 2 * self._window, 0, None
