"""What ``linear_objective`` refuses, before any collective runs.

A rank that fails alone leaves the others waiting, so every check answers alike on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_profit.objectives import Objective

IGNORED_LABEL = -100

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weight: Tensor | None,
    given: Mapping[str, Tensor | None],
    objective: Objective,
    group: dist.ProcessGroup | None,
    chunk_rows: int | None,
) -> None:
    """Checks all that can be seen without reading a tensor.

    Args:
        hidden: [N, H].
        weight: [V, H].
        labels: [N] int64.
        loss_weight: floating [N] or None.
        given: statistics [N] that the caller gives, or None, by argument name.
        objective: asks for the statistics.
        group: process group or None.
        chunk_rows: rows per chunk or None.

    Raises:
        ValueError: something does not fit; the message names the value and the remedy.
    """
    _check_matrices(hidden, weight)
    _check_vector("labels", labels, hidden)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}; pass int64 (.long()).")
    for name, vector in {"loss_weight": loss_weight, **given}.items():
        if vector is not None:
            _check_vector(name, vector, hidden)
            _check_constant(name, vector)
    _check_statistics(objective, given, group)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; pass at least 1, or None for the default.")


def check_extra_statistics(names: Set[str], computed: Set[str]) -> None:
    """Checks that all ``names`` are among those that the kernel can compute.

    Raises:
        ValueError: one is not.
    """
    if unknown := names - computed:
        raise ValueError(
            f"extra_statistics names {', '.join(sorted(unknown))}; the kernel computes "
            f"{', '.join(sorted(computed))}."
        )


def check_labels(labels: Tensor, vocab_size: int) -> None:
    """Checks that labels [N] are -100 or in [0, vocab_size).

    Reads one flag back from the device. Selecting the supervised rows waits for the device anyway,
    and an error with the offending label is worth more than an assertion in a later kernel.

    Raises:
        ValueError: another label; names the first.
    """
    valid = (labels == IGNORED_LABEL) | ((labels >= 0) & (labels < vocab_size))
    if not bool(valid.all()):
        row = int((~valid).nonzero()[0])
        raise ValueError(
            f"label {int(labels[row])} in row {row} is neither {IGNORED_LABEL} (unsupervised) nor "
            f"in 0..{vocab_size - 1}; pass global vocabulary ids."
        )


def _check_matrices(hidden: Tensor, weight: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1):
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; "
            "pass hidden [N, H] and weight [V, H]."
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in _DTYPES:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; "
            "pass both in one of float16, bfloat16, float32, float64."
        )
    if hidden.device != weight.device:
        raise ValueError(
            f"hidden is on {hidden.device} and weight on {weight.device}; move them together."
        )


def _check_vector(name: str, vector: Tensor, hidden: Tensor) -> None:
    if vector.shape != hidden.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(vector.shape)}; pass one entry for each of the "
            f"{hidden.size(0)} rows of hidden."
        )
    if vector.device != hidden.device:
        raise ValueError(f"{name} is on {vector.device} and hidden on {hidden.device}; move it.")


def _check_constant(name: str, vector: Tensor) -> None:
    if name == "selected":
        if vector.dtype != torch.bool:
            raise ValueError(f"{name} is {vector.dtype}; pass a mask of torch.bool.")
    elif not vector.is_floating_point():
        raise ValueError(f"{name} is {vector.dtype}; pass a floating dtype (.float()).")
    if vector.requires_grad:
        raise ValueError(f"{name} requires a gradient, but it is held constant; pass .detach().")


def _check_statistics(
    objective: Objective, given: Mapping[str, Tensor | None], group: dist.ProcessGroup | None
) -> None:
    name = type(objective).__name__
    for missing in sorted(objective.required_statistics & given.keys()):
        if given[missing] is not None:
            continue
        if missing != "uniform":
            raise ValueError(f"objective {name} needs {missing}; pass {missing}=[N].")
        if group is not None:
            raise ValueError(
                f"objective {name} draws random numbers, which must agree over the group; "
                "pass uniform=[N] (objectives.token_uniform makes them)."
            )
