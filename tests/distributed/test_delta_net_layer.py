"""A Gated DeltaNet layer gives a record the same outputs and gradients packed and alone, at any layout."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "delta_net_layer.py"
LAYOUTS = {
    "alone": (1, "1 1"),
    "alone-recompute": (1, "1 1 recompute"),
    "tp2": (2, "2 1"),
    "tp2-sp": (2, "2 1 sp recompute"),
    "cp2": (2, "1 2"),
    "tp2-kernels": (2, "2 1 kernels"),
    "cp2-kernels": (2, "1 2 kernels recompute"),
}
SLOW = ("alone-recompute", "tp2", "tp2-kernels")


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in LAYOUTS]
)
def test_a_record_is_the_same_packed_and_alone(ranks, layout):
    world_size, words = LAYOUTS[layout]
    ranks(world_size, SCRIPT, *words.split())
