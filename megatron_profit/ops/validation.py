"""Checks of ``linear_objective``'s inputs, before any collective runs.

A rank that fails alone leaves the others waiting, so every check gives the same answer on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_profit.objectives import Objective
from megatron_profit.objectives.base import (
    COMPUTED_STATISTICS,
    EXTERNAL_STATISTICS,
    KERNEL_STATISTICS,
    check_external_name,
)
from megatron_profit.ops.kernels import IMPLEMENTATIONS, Implementation
from megatron_profit.ops.rows import IGNORED_LABEL
from megatron_profit.ops.tiling import BACKWARDS, Backward

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weight: Tensor | None,
    external: Mapping[str, Tensor],
    objective: Objective,
    group: dist.ProcessGroup | None,
) -> None:
    """Check everything that can be seen without reading a tensor.

    Args:
        hidden: [N, H].
        weight: [V, H].
        labels: [N] int64.
        loss_weight: floating [N] or None.
        external: statistics [N] that the caller gives, by name.
        objective: asks for the statistics.
        group: process group or None.

    Raises:
        ValueError: an input does not fit; the message names the value and the remedy.
    """
    _check_matrices(hidden, weight)
    _check_vector("labels", labels, hidden)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}; pass int64 (.long()).")
    if loss_weight is not None:
        _check_vector("loss_weight", loss_weight, hidden)
        _check_constant("loss_weight", loss_weight)
    for name, vector in external.items():
        check_external_name(name)
        _check_vector(name, vector, hidden)
        _check_constant(name, vector, mask_allowed=True)
    _check_statistics(objective, external, group)


def check_options(
    implementation: Implementation,
    backward: Backward,
    chunk_vocab: int | None,
    gradient_accumulation_fusion: bool,
) -> None:
    """Check the options of the computation.

    Raises:
        ValueError: an unknown name, an empty block, or an option without meaning for the dense path.
    """
    for name, value, known in (
        ("implementation", implementation, IMPLEMENTATIONS),
        ("backward", backward, BACKWARDS),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}.")
    if chunk_vocab is not None and chunk_vocab < 1:
        raise ValueError(f"chunk_vocab is {chunk_vocab}; pass at least 1, or None for the default.")
    if implementation == "reference":
        changed = {
            "backward": backward != "auto",
            "chunk_vocab": chunk_vocab is not None,
            "gradient_accumulation_fusion": gradient_accumulation_fusion,
        }
        for name in (name for name, is_changed in changed.items() if is_changed):
            raise ValueError(
                f"{name} has no meaning for implementation='reference', which is plain autograd on "
                "dense logits; leave it out."
            )


def join_external(
    external: Mapping[str, Tensor] | None, named: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Return the external statistics by name, from the mapping and from keyword arguments.

    Raises:
        TypeError: a keyword is neither an argument nor a statistic of this package's objectives.
        ValueError: a statistic is given twice.
    """
    joined = dict(external or {})
    for name, vector in named.items():
        if name not in EXTERNAL_STATISTICS:
            raise TypeError(
                f"linear_objective has no argument {name!r}; a statistic of your own goes into "
                f'external={{"{name}": [N]}}.'
            )
        if vector is not None:
            if name in joined:
                raise ValueError(f"{name} is given twice; leave it out of external.")
            joined[name] = vector
    return joined


def check_main_grad(weight: Tensor) -> Tensor:
    """Return the buffer ``weight.main_grad`` that its gradient can be added to.

    Raises:
        ValueError: there is none, or it has another shape.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or hasattr(weight, "__fsdp_param__"):
        raise ValueError(
            "gradient_accumulation_fusion needs a buffer weight.main_grad that gradients are added "
            "to, as Megatron's DistributedDataParallel makes it; pass False without one, and under "
            "Megatron-FSDP."
        )
    if main_grad.shape != weight.shape:
        raise ValueError(
            f"weight.main_grad has shape {tuple(main_grad.shape)} and weight {tuple(weight.shape)};"
            " pass gradient_accumulation_fusion=False."
        )
    return main_grad


def check_extra_statistics(names: Set[str]) -> None:
    """Check that all ``names`` are among those that the kernel can compute.

    Raises:
        ValueError: one is not.
    """
    if unknown := names - set(COMPUTED_STATISTICS):
        raise ValueError(
            f"extra_statistics names {', '.join(sorted(unknown))}; the kernel computes "
            f"{', '.join(COMPUTED_STATISTICS)}."
        )


def check_labels(labels: Tensor, vocab_size: int) -> None:
    """Check that labels [N] are -100 or in [0, vocab_size).

    Reads one flag back from the device. Selecting the supervised rows waits for the device anyway, and an
    error that names the label helps more than an assertion in a later kernel.

    Raises:
        ValueError: another label; the message names the first.
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


def _check_constant(name: str, vector: Tensor, *, mask_allowed: bool = False) -> None:
    if not (vector.is_floating_point() or (mask_allowed and vector.dtype == torch.bool)):
        mask = "a mask of torch.bool or " if mask_allowed else ""
        raise ValueError(f"{name} is {vector.dtype}; pass {mask}a floating dtype (.float()).")
    if vector.requires_grad:
        raise ValueError(f"{name} requires a gradient, but it is held constant; pass .detach().")


def _check_statistics(
    objective: Objective, external: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    name = type(objective).__name__
    for missing in sorted(objective.required_statistics - external.keys()):
        if missing == "uniform":
            if group is not None:
                raise ValueError(
                    f"objective {name} draws random numbers, which must agree over the group; "
                    "pass uniform=[N] (objectives.token_uniform makes them)."
                )
        elif missing in EXTERNAL_STATISTICS:
            raise ValueError(f"objective {name} needs {missing}; pass {missing}=[N].")
        elif missing not in KERNEL_STATISTICS:
            raise ValueError(
                f"objective {name} needs {missing}, which the kernel does not compute (it computes "
                f'{", ".join(KERNEL_STATISTICS)}); pass external={{"{missing}": [N]}}.'
            )
