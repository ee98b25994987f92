"""The choices of the kernel's flags. Help reads them without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_profit.ops.tiling import Backward

IMPLEMENTATIONS = ("auto", "fused", "reference")
# The ones of `ops.tiling`, whose package imports torch.
BACKWARDS: tuple[Backward, ...] = ("auto", "save", "recompute")


def check_implementation(implementation: str, backward: Backward) -> None:
    """Refuse a strategy of the kernel where the kernel is not used.

    Raises:
        ValueError: It would be ignored.
    """
    if implementation == "reference" and backward != "auto":
        raise ValueError(
            f"--objective-backward {backward} is a strategy of the fused kernel, and "
            "--objective-implementation reference is plain autograd on dense logits; drop one of them"
        )
