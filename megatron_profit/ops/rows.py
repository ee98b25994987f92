"""The supervised rows.

Inside the kernel every vector has one entry per supervised row. Prompts and padding take no part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED_LABEL = -100


@dataclass(frozen=True, eq=False)
class SupervisedTokens:
    """M supervised rows among N.

    Attributes:
        index: [M] int64, ascending positions among the N rows.
        targets: [M] int64 global vocabulary ids.
        num_rows: N.
    """

    index: Tensor
    targets: Tensor
    num_rows: int

    @classmethod
    def of(cls, labels: Tensor, loss_weight: Tensor | None) -> SupervisedTokens:
        """Return the rows with a label in ``labels`` [N] and, if given, a nonzero ``loss_weight`` [N].

        A GPU has to be waited for here: the number of rows is the size of all further tensors.
        """
        supervised = labels != IGNORED_LABEL
        if loss_weight is not None:
            supervised &= loss_weight != 0
        index = supervised.nonzero().squeeze(1)
        return cls(index, labels[index], labels.numel())

    def __len__(self) -> int:
        return self.index.numel()

    def take(self, vector: Tensor) -> Tensor:
        """Select the supervised entries of a vector: [N] to [M]."""
        return vector[self.index]

    def scatter(self, tensor: Tensor) -> Tensor:
        """Spread [M, ...] to [N, ...], with zeros in the other rows."""
        return tensor.new_zeros(self.num_rows, *tensor.shape[1:]).index_copy_(0, self.index, tensor)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 inputs, float32 for all others."""
    return torch.promote_types(dtype, torch.float32)


def input_precision(tensor: Tensor) -> torch.autocast:
    """Return a context in which products keep their inputs' dtype, whatever autocast is active.

    The backward pass may recompute the logits of the forward pass: both must be rounded alike.
    """
    return torch.autocast(tensor.device.type, enabled=False)
