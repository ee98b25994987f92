"""Any layout, same mathematics: runs at many layouts take the same steps as a plain loop in fp64.

In every row of the table a step is one epoch of the same 16 records, which are 16 rows alone and 8 packed.
The reference of a row is therefore the same for all of them: each record alone through the HuggingFace
model, one process, double precision (plain_training.py). Later steps show what the optimizer made of the
gradients, and are where PSFT's ratio differs from 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
from plain_training import CASES, Plan, Trained, profit, psft, train, write_uneven_chats
from plot_run import read_curves
from tiny_models import EXAMPLES, make_family

TURNS = [2, 1, 3, 1, 3, 1, 2, 3, 1, 2, 1, 3, 1, 2, 3, 2]
ALONE = ("--no-packing", "--seq-length", 96, "--global-batch-size", 16)
PACKED = ("--packing", "--seq-length", 128, "--global-batch-size", 8)
TOLERANCE = 1e-5
OBJECTIVES = {"sft": CASES["sft"], "profit": profit(0.001), "psft": psft(2)}

FLAGS = {
    "tp2": "--tensor-model-parallel-size 2",
    "sp": "--sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
    "pp4": "--pipeline-model-parallel-size 4",
    "vpp2": "--num-layers-per-virtual-pipeline-stage 1",
    "cp2": "--context-parallel-size 2",
    "cp4": "--context-parallel-size 4",
    "ep2": "--expert-model-parallel-size 2",
    "ep4": "--expert-model-parallel-size 4",
    "etp1": "--expert-tensor-parallel-size 1",
    "mb1": "--micro-batch-size 1",
    "mb2": "--micro-batch-size 2",
    "mb4": "--micro-batch-size 4",
    "mb8": "--micro-batch-size 8",
    "packed": " ".join(map(str, PACKED)),
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "selective": "--recompute-granularity selective",
    "sharded": "--use-distributed-optimizer",
    "overlap": "--overlap-grad-reduce --overlap-param-gather",
}
# Ranks, then what is not 1, not off and not the rest of the ranks, which is data parallelism.
DENSE = [
    "1 mb1",
    "1 mb8 packed",
    "2 mb2 sharded overlap",
    "2 mb2 packed",
    "2 tp2 mb4",
    "2 tp2 sp mb2 packed full",
    "2 pp2 mb4",
    "2 pp2 vpp2 mb2 packed selective",
    "2 cp2 mb4",
    "2 cp2 mb2 packed",
    "4 mb1 sharded",
    "4 tp2 sp mb2 packed sharded",
    "4 tp2 pp2 sp mb2",
    "4 tp2 pp2 vpp2 sp mb1 packed full",
    "4 tp2 cp2 sp mb2 packed selective",
    "4 pp4 mb1 packed",
    "4 pp2 mb2 sharded overlap full",
    "4 pp2 vpp2 mb1 packed sharded",
    "4 cp2 pp2 mb1 packed",
    "4 cp2 mb2 packed sharded overlap",
    "4 cp4 mb4 packed",
    "4 cp4 mb2 full",
]
# The loss that balances the routers is defined per micro-batch, so that here a micro-batch is one row.
EXPERTS = [
    "1 mb1",
    "2 ep2 mb1",
    "2 ep2 mb1 packed sharded",
    "2 tp2 sp mb1 packed",
    "2 cp2 ep2 mb1",
    "4 ep4 mb1 full",
    "4 ep2 tp2 sp mb1",
    "4 ep2 etp1 tp2 sp mb1 packed sharded",
    "4 ep2 pp2 mb1",
    "4 ep2 pp2 vpp2 mb1 packed sharded full",
    "4 tp2 pp2 sp mb1 packed",
    "4 ep2 cp2 mb1 packed",
]
# In `make test`; the rest in `make test-all`.
DEFAULT = {
    ("dense", "4 tp2 pp2 sp mb2", "psft"),
    ("dense", "4 tp2 sp mb2 packed sharded", "profit"),
    ("experts", "2 ep2 mb1", "profit"),
}


def rows() -> list:
    table = [("dense", layout) for layout in DENSE] + [("experts", layout) for layout in EXPERTS]
    return [
        pytest.param(
            *row,
            name,
            marks=[] if (*row, name) in DEFAULT else pytest.mark.slow,
            id=f"{row[1]} {name}",
        )
        for row in table
        for name in OBJECTIVES
    ]


@dataclass(frozen=True)
class Model:
    """A HuggingFace folder, and what it is trained with."""

    hf: Path
    plan: Plan

    @cache
    def expected(self, objective: str) -> Trained:
        return train(self.hf, self.plan, OBJECTIVES[objective])


@pytest.fixture(scope="session")
def models(tied_model, tmp_path_factory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("layouts")
    data = write_uneven_chats(EXAMPLES / "arithmetic_chatty.jsonl", folder / "chats.jsonl", TURNS)
    plan = Plan(data, steps=3, batch=16, seq_length=96, clip_grad=1.0)
    return {
        "dense": Model(tied_model.hf, plan),
        "experts": Model(make_family(folder, "qwen3-moe").hf, replace(plan, balancing=1.0)),
    }


@pytest.mark.parametrize(("model", "layout", "objective"), rows())
def test_any_layout_takes_the_same_steps(sft, models, tmp_path, model, layout, objective):
    hf, plan = models[model].hf, models[model].plan
    ranks, *words = layout.split()
    sft(
        *(int(ranks), "--hf-model", hf, *plan.flags, *OBJECTIVES[objective].flags.split()),
        *(flag for word in words for flag in FLAGS[word].split()),
        *("--tensorboard-dir", tmp_path),
    )
    assert_same_steps(tmp_path, models[model].expected(objective))


def assert_same_steps(tensorboard: Path, expected: Trained) -> None:
    """What a run logged, in the full precision of fp32, against the metrics of the plain loop."""
    curves = read_curves(tensorboard)
    for name in expected.metrics[0]:
        steps, values = curves[name]
        assert steps == [*range(1, len(expected.metrics) + 1)]
        wanted = [line[name] for line in expected.metrics]
        assert values == pytest.approx(wanted, rel=TOLERANCE), name
