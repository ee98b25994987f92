"""A model with experts in training: the same step at every layout, and what its router is balanced by."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_models import make_family

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
SP = "--tensor-model-parallel-size 2 --sequence-parallel"
LAYOUTS = [
    # More padding in each row, too: the router's losses must not see it.
    pytest.param(2, "--expert-model-parallel-size 2 --seq-length 64", id="ep2"),
    pytest.param(
        4,
        f"{SP} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1 --seq-length 80",
        id="dp2-tp2-ep2",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        4, f"{SP} --pipeline-model-parallel-size 2", id="tp2-etp2-pp2", marks=pytest.mark.slow
    ),
    pytest.param(
        4,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--expert-model-parallel-size 2 --use-distributed-optimizer --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1 --seq-length 64",
        id="pp2-vpp2-ep2-recompute",
        marks=pytest.mark.slow,
    ),
]
NAMES = ("lm loss", "load_balancing_loss", "grad norm", "kept fraction")


@pytest.fixture(scope="session")
def moe(tmp_path_factory) -> Path:
    return make_family(tmp_path_factory.mktemp("moe"), "qwen3-moe").hf


@pytest.fixture(scope="session")
def reference(sft, moe) -> dict[str, list[float]]:
    return logged(sft(1, *command(moe)).stdout)


def command(moe: Path) -> list[object]:
    return [
        *("--hf-model", moe, "--data", DATA / "arithmetic_base.jsonl", "--objective", "profit"),
        *("--prob-threshold", 1e-3, "--threshold-direction", "higher", "--seq-length", 48),
        *("--micro-batch-size", 1, "--global-batch-size", 4, "--lr", 1e-3, "--train-iters", 3),
        *("--moe-aux-loss-coeff", 1, "--clip-grad", 0, "--no-packing"),
    ]


def logged(output: str) -> dict[str, list[float]]:
    return {
        name: [float(value) for value in re.findall(rf"\| {name}: (\S+) \|", output)]
        for name in NAMES
    }


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS)
def test_the_same_step_at_every_layout(sft, moe, reference, world_size, layout):
    result = sft(world_size, *command(moe), *layout.split()).stdout
    assert " 0 truncated" in result
    for name, values in logged(result).items():
        assert values == [pytest.approx(value, rel=2e-5) for value in reference[name]], name
        assert len(values) == 3
    assert 0 < reference["kept fraction"][0] < 1


@pytest.mark.slow
def test_the_router_is_balanced_alike_whatever_the_objective_keeps(sft, moe, reference):
    """All dropped: what is left is the gradient of the balancing, and it is not small."""
    everything_dropped = sft(1, *command(moe), "--prob-threshold", 0.999)
    found = logged(everything_dropped.stdout)
    assert found["kept fraction"] == [0.0] * 3
    assert found["load_balancing_loss"][0] == reference["load_balancing_loss"][0]
    assert found["grad norm"][0] > 0.01
