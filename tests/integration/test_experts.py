"""What the router of a model with experts is balanced by; layouts are in tests/distributed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_models import make_family

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"


@pytest.mark.slow
def test_the_router_is_balanced_alike_whatever_the_objective_keeps(sft, tmp_path):
    """All dropped: what is left is the gradient of the balancing, and it is not small."""
    model = make_family(tmp_path, "qwen3-moe").hf

    def logged(tau: float) -> dict[str, float]:
        printed = sft(
            *(1, "--hf-model", model, "--data", DATA / "arithmetic_base.jsonl"),
            *("--objective", "profit", "--threshold-direction", "higher", "--prob-threshold", tau),
            *("--no-packing", "--seq-length", 48, "--micro-batch-size", 1),
            *("--global-batch-size", 4, "--lr", 1e-3, "--train-iters", 1),
            *("--moe-aux-loss-coeff", 1),
        ).stdout
        names = ("load_balancing_loss", "grad norm", "kept fraction")
        return {n: float(re.search(rf"\| {n}: (\S+) \|", printed).group(1)) for n in names}

    some, nothing = logged(1e-3), logged(0.999)
    assert 0 < some["kept fraction"] < 1
    assert nothing["kept fraction"] == 0
    assert nothing["load_balancing_loss"] == some["load_balancing_loss"]
    assert nothing["grad norm"] > 0.01
