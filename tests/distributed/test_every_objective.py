"""Every objective through the whole entry, against its formula in a plain training in fp64.

The values of training and of an evaluation, gradient norms, the ranking of a global batch, and the
numbers of a reference model, which come from another model, once, and serve later runs.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from layouts import TOLERANCE, assert_same_steps, parse
from objective_options import OPTIONS
from plain_objectives import CASES
from plain_training import Plan, train
from tiny_models import EXAMPLES
from transformers import AutoModelForCausalLM

from megatron_profit.commands.plot_run import read_curves

PLAN = Plan(
    EXAMPLES / "arithmetic_chatty.jsonl",
    steps=2,
    batch=8,
    clip_grad=1.0,
    valid=EXAMPLES / "arithmetic_heldout.jsonl",
)
WITH_REFERENCE = ("iw-sft", "asft", "stm", "rho1", "prift-prob", "prift-mass", "profit record")
RUNS = [
    ("dft", "2 tp2 mb4"),
    ("gce", "2 pp2 mb2"),
    ("deft", "2 mb4 sharded"),
    ("eaft", "2 tp2 sp mb2"),
    ("chord-phi", "2 cp2 mb4"),
    ("infosft", "2 tp2 mb4"),
    ("prift-prob", "2 pp2 mb2"),
    ("prift-mass", "2 tp2 mb4"),
    ("prift-mass", "2 cp2 mb2"),
    ("talr", "2 cp2 mb4"),
    ("talr", "2 tp2 mb2"),
    ("profit quantile", "2 cp2 mb4"),
    ("profit quantile", "4 tp2 pp2 mb2"),
    ("profit record", "2 cp2 mb4"),
    ("profit record", "2 mb2 sharded"),
    ("entropy", "1 mb1"),
    ("entropy", "2 cp2 mb4"),
    ("entropy", "4 tp2 pp2 mb4"),
    ("entropy", "4 tp2 cp2 sp mb2 sharded"),
    ("iw-sft", "2 tp2 mb8"),
    ("iw-sft", "4 cp2 mb2"),
    ("asft", "2 pp2 mb2"),
    ("asft", "2 tp2 sp mb4"),
    ("stm", "2 mb2 sharded"),
    ("stm", "2 pp2 vpp2 mb2"),
    ("rho1", "2 pp2 vpp2 group3 mb1"),
    ("rho1", "4 tp2 pp2 sp mb2"),
    ("rho1", "4 pp2 cp2 mb2"),
]
DEFAULT = ("entropy", "2 cp2 mb4")


@pytest.fixture(scope="module")
def reference(untied_model, tmp_path_factory) -> Path:
    """A model near the one that is trained."""
    folder = tmp_path_factory.mktemp("reference")
    model = AutoModelForCausalLM.from_pretrained(untied_model.hf, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run(sft, untied_model, reference, tmp_path):
    """Trains an objective at a layout, compares it with the plain training and gives what was printed."""

    def run(objective: str, layout: str) -> str:
        ranks, flags = parse(layout)
        case, tensorboard = CASES[objective], tmp_path / layout.replace(" ", "-")
        given = objective in WITH_REFERENCE
        if given:
            flags += ["--ref-hf-model", reference, "--ref-cache", tmp_path / "cache"]
        printed = sft(
            *(ranks, "--hf-model", untied_model.hf, *PLAN.flags, *case.flags, *flags),
            *("--tensorboard-dir", tensorboard),
        ).stdout
        expected = train(untied_model.hf, PLAN, case, reference if given else None)
        assert_same_steps(tensorboard, expected)
        evaluated = float(re.search(r"objective value: (\S+)", printed).group(1))
        assert evaluated == pytest.approx(expected.valid, rel=TOLERANCE)
        return printed

    return run


@pytest.mark.parametrize(
    ("objective", "layout"),
    [pytest.param(*r, marks=[pytest.mark.slow] * (r != DEFAULT), id="-".join(r)) for r in RUNS],
)
def test_an_objective_trains_its_formula(run, objective, layout):
    run(objective, layout)


def test_the_probabilities_of_the_base_are_logged_where_no_objective_reads_them(
    sft, untied_model, tmp_path
):
    """In the first step the model is the base; the training stays the same."""
    ranks, flags = parse("2 tp2 mb4")
    case = CASES["profit"]
    sft(
        *(ranks, "--hf-model", untied_model.hf, *PLAN.flags, *case.flags, *flags),
        *(
            "--log-reference",
            "--ref-cache",
            tmp_path / "cache",
            "--tensorboard-dir",
            tmp_path / "curves",
        ),
    )
    assert_same_steps(tmp_path / "curves", train(untied_model.hf, PLAN, case))
    curves = read_curves(tmp_path / "curves")
    for kind in ("", " kept"):
        (_, p), (_, q) = (curves[f"mean {letter}{kind}"] for letter in "pq")
        assert q[0] == pytest.approx(p[0], rel=1e-6)
        assert q[1] != pytest.approx(p[1], rel=1e-4)
    assert "mean q kept validation" in curves


def test_a_reference_is_computed_once_and_found_at_another_layout(run, tmp_path):
    assert "reference log-probabilities: train row 0" in run("rho1", "2 mb2")
    assert "reference log-probabilities" not in run("rho1", "2 cp2 mb4")
    assert len(list((tmp_path / "cache").glob("*/ref_log_prob.float32"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["2 tp2 mb4", "2 pp2 mb2"])
def test_an_objective_from_outside_trains_with_a_statistic_of_its_own(
    ranks, untied_model, tmp_path, layout
):
    """From a share that no token has on, all weights are 1, as in plain SFT."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(EXAMPLES.parent)!r})\n"
        "runpy.run_module('megatron_profit.sft', run_name='__main__')\n"
    )
    processes, flags = parse(layout)
    model = ("--device", "cpu", "--lr-decay-style", "constant", "--hf-model", untied_model.hf)
    for share in (1, 1e-3):
        ranks(
            *(processes, program, *model, *PLAN.flags, *flags, "--tensorboard-dir"),
            *(tmp_path / str(share), "--objective", "own_objective:RareTokens"),
            *("--frequency-threshold", share),
        )
    assert_same_steps(tmp_path / "1", train(untied_model.hf, PLAN, CASES["sft"]))
    curves = read_curves(tmp_path / "0.001")
    for loss, plain in zip(curves["objective"][1], curves["lm loss"][1], strict=True):
        assert 0 < loss < plain


def test_no_objective_is_missing():
    assert {name.split()[0] for name in CASES} == set(OPTIONS)
    assert {name for name, _ in RUNS} | {"sft", "profit", "psft"} == set(CASES)
