"""Any layout, same mathematics: runs at many layouts take the same steps as a plain loop in fp64.

In every row of the table a step is one epoch of the same 16 records, which are 16 rows alone and 8 packed.
The reference of a row is therefore the same for all of them: each record alone through the HuggingFace
model, one process, double precision (plain_training.py). Later steps show what the optimizer made of the
gradients, and are where PSFT's ratio differs from 1.
"""

from __future__ import annotations

import pytest
from layouts import OBJECTIVES, PACKED, Model, assert_same_steps, parse, trained_models

DENSE = [
    "1 mb1",
    "1 mb8 packed",
    "2 mb2 sharded overlap",
    "2 mb2 packed",
    "2 tp2 mb4 padded",
    "2 tp2 sp mb2 packed full",
    "2 pp2 mb4 uneven",
    "2 pp2 vpp2 mb2",
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
# The loss that balances the routers is defined per micro-batch, so that here a micro-batch is one row alone.
EXPERTS = [
    "1 mb1",
    "2 ep2 mb1",
    "2 tp2 sp mb1 sharded",
    "2 cp2 ep2 mb1",
    "4 ep4 mb1 full",
    "4 ep2 tp2 sp mb1",
    "4 ep2 etp1 tp2 sp mb1 sharded",
    "4 ep2 pp2 mb1 allgather",
    "4 ep2 pp2 vpp2 mb1 sharded full",
    "4 tp2 pp2 sp mb1",
    "4 ep2 cp2 mb1",
]
# Two layers of three have a recurrent state.
STATES = [
    "1 mb4 packed",
    "2 tp2 mb4",
    "2 tp2 sp mb2 packed full",
    "2 pp2 vpp2 mb2 packed sharded selective norms",
    "2 cp2 mb2 packed",
    "2 mb2 packed sharded overlap",
    "4 tp2 pp2 sp mb2 packed",
]
STATES_EXPERTS = ["2 ep2 mb1", "2 tp2 sp mb1 sharded"]
OLMO2 = [
    "1 mb8 packed",
    "2 mb2 packed sharded overlap",
    "2 tp2 mb4 padded",
    "2 tp2 sp mb2 packed full",
    "3 tp3 mb2 packed selective",
    "3 tp3 mb4",
    "2 pp2 vpp2 mb2 packed",
    "2 cp2 mb2 packed",
    "4 tp2 pp2 sp mb2 packed sharded",
    "4 tp2 cp2 sp mb2 packed selective",
]
# In `make test`; the rest in `make test-all`.
DEFAULT = {
    ("dense", "4 tp2 pp2 sp mb2", "psft"),
    ("dense", "4 tp2 sp mb2 packed sharded", "profit"),
    ("experts", "2 ep2 mb1", "profit"),
    ("states", "2 tp2 sp mb2 packed full", "profit"),
    ("states-experts", "2 ep2 mb1", "sft"),
    ("olmo2", "2 tp2 sp mb2 packed full", "profit"),
}


def rows() -> list:
    models = {
        "dense": DENSE,
        "experts": EXPERTS,
        "states": STATES,
        "states-experts": STATES_EXPERTS,
        "olmo2": OLMO2,
    }
    layouts = [(model, layout) for model, layouts in models.items() for layout in layouts]
    table = [(*row, name) for row in layouts for name in OBJECTIVES]
    return [
        pytest.param(*row, marks=[pytest.mark.slow] * (row not in DEFAULT), id="-".join(row))
        for row in table
    ]


@pytest.fixture(scope="session")
def models(tied_model, tmp_path_factory) -> dict[str, Model]:
    return trained_models(tied_model.hf, tmp_path_factory.mktemp("layouts"))


def test_the_steps_are_worth_comparing(models):
    profit, psft = (models["dense"].expected(name).metrics for name in ("profit", "psft"))
    assert all(0.1 < step["kept fraction"] < 0.9 for step in profit)
    assert psft[1]["mean ratio"] > 1.1
    assert 0.1 < psft[1]["clip fraction"] < 0.9
    clip = models["dense"].plan.clip_grad
    assert profit[0]["grad-norm"] > clip


@pytest.mark.parametrize(("model", "layout", "objective"), rows())
def test_any_layout_takes_the_same_steps(sft, models, tmp_path, model, layout, objective):
    hf, plan = models[model].hf, models[model].plan
    ranks, flags = parse(layout, packed=PACKED)
    case = OBJECTIVES[objective]
    sft(
        *(ranks, "--hf-model", hf, *plan.flags, *case.flags, *flags),
        *("--tensorboard-dir", tmp_path),
    )
    assert_same_steps(tmp_path, models[model].expected(objective))
