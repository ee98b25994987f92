"""A run that resumes at another layout takes the steps that it would have taken without interruption.

Every step has records of its own, so that equal steps mean the same order of the data. Iteration 3, at which
the runs stop, is inside an outer batch of PSFT.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from layouts import assert_same_steps, parse
from plain_objectives import psft
from plain_training import Plan, Trained, train
from tiny_models import EXAMPLES, make_family

from megatron_profit.commands.plot_run import read_curves

CASE = psft(4)
PLAN = Plan(EXAMPLES / "arithmetic_chatty.jsonl", steps=6, batch=8, clip_grad=1.0)
RESUMES = {
    "dp2-to-tp2": ("2 mb2 sharded reshardable", "2 tp2 sp mb4 sharded"),
    "tp2-to-pp2": ("2 tp2 mb4", "2 pp2 mb2"),
    "pp2-vpp2-to-dp2": ("2 pp2 vpp2 mb2", "2 mb4"),
    "tp2-pp2-to-1": ("4 tp2 pp2 sp mb2 sharded reshardable", "1 mb8 sharded"),
    "cp2-to-dp4": ("2 cp2 mb4 sharded reshardable", "4 mb1 sharded"),
}


@pytest.fixture(scope="module")
def expected(tied_model) -> Trained:
    return train(tied_model.hf, PLAN, CASE)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "dp2-to-tp2")) for n in RESUMES]
)
def test_a_run_continues_at_another_layout(sft, tied_model, expected, tmp_path, name):
    resume(sft, tied_model.hf, PLAN, RESUMES[name], tmp_path)
    assert_same_steps(tmp_path / "tensorboard", expected)


@pytest.mark.slow
def test_packed_rows_continue_at_another_layout(sft, tied_model, tmp_path):
    plan = replace(PLAN, packing=True, seq_length=128, batch=4)
    resume(sft, tied_model.hf, plan, ("2 cp2 mb2", "4 tp2 pp2 sp mb2"), tmp_path)
    assert_same_steps(tmp_path / "tensorboard", train(tied_model.hf, plan, CASE))


# With expert parallelism the experts have an optimizer of their own.
EXPERTS = {
    "ep2-to-tp2-pp2": ("2 ep2 mb1 sharded reshardable", "4 tp2 pp2 sp mb1 sharded"),
    "pp2-to-ep2": ("2 pp2 mb1 sharded reshardable", "2 ep2 mb1 sharded"),
    "ep2-to-ep4": ("2 ep2 mb1", "4 ep4 mb1"),
    "ep2-to-pp2": ("2 ep2 mb1", "2 pp2 mb1"),
    "tp2-to-ep2": ("2 tp2 sp mb1", "2 ep2 mb1"),
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> tuple[Path, Plan, Trained]:
    hf = make_family(tmp_path_factory.mktemp("experts"), "qwen3-moe").hf
    plan = replace(PLAN, balancing=1.0)
    return hf, plan, train(hf, plan, CASE)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_continue_at_another_layout(sft, experts, tmp_path, name):
    hf, plan, expected = experts
    resume(sft, hf, plan, EXPERTS[name], tmp_path)
    assert_same_steps(tmp_path / "tensorboard", expected)


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> Path:
    return make_family(tmp_path_factory.mktemp("states"), "qwen3.5").hf


@pytest.mark.slow
def test_states_continue_at_another_layout(sft, states, tmp_path):
    plan = replace(PLAN, packing=True, seq_length=128, batch=4)
    resume(sft, states, plan, ("2 tp2 sp mb2", "2 pp2 mb2"), tmp_path)
    assert_same_steps(tmp_path / "tensorboard", train(states, plan, CASE))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["1 mb4", "2 tp2 mb4", "2 mb2 sharded"])
def test_states_in_bf16_continue(sft, states, tmp_path, layout):
    ranks, flags = parse(layout)
    command = (ranks, "--hf-model", states, "--bf16", *PLAN.flags, *CASE.flags, *flags)
    interrupted = ("--save", tmp_path / "save", "--save-interval", 3, "--exit-interval", 3)
    runs = {"whole": [()], "resumed": [interrupted, ("--load", tmp_path / "save")]}
    for name, parts in runs.items():
        for part in parts:
            sft(*command, *part, "--tensorboard-dir", tmp_path / name)
    whole, resumed = (read_curves(tmp_path / name) for name in runs)
    assert len(whole["grad-norm"][0]) == PLAN.steps
    for name in ("lm loss", "grad-norm"):
        assert resumed[name] == whole[name], name


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts",
    [
        ("2 tp2 sp mb2 sharded reshardable", "3 tp3 mb4 sharded"),
        ("2 pp2 vpp2 mb2", "2 tp2 mb4"),
    ],
)
def test_norms_that_are_split_over_ranks_continue_at_another_layout(sft, tmp_path, layouts):
    """OLMo-2's norms of all queries and of all keys."""
    hf = make_family(tmp_path, "olmo2").hf
    resume(sft, hf, PLAN, layouts, tmp_path)
    assert_same_steps(tmp_path / "tensorboard", train(hf, PLAN, CASE))


@pytest.mark.slow
def test_a_running_quantile_continues_at_another_layout(sft, tied_model, tmp_path):
    """The checkpoint has its counts, so each step has the bounds of a run that was not interrupted."""
    objective = ("--objective", "profit", "--threshold-direction", "middle")
    flags = (*objective, "--threshold-quantile", 0.2, 0.9, "--threshold-scope", "running")
    layouts = ("2 mb2 sharded reshardable", "2 tp2 sp mb4 sharded")
    resume(sft, tied_model.hf, PLAN, layouts, tmp_path, flags)
    ranks, whole = parse("1 mb8")
    command = (ranks, "--hf-model", tied_model.hf, *PLAN.flags, *flags, *whole)
    sft(*command, "--tensorboard-dir", tmp_path / "whole")
    resumed, expected = (read_curves(tmp_path / name) for name in ("tensorboard", "whole"))
    for name in ("lower threshold", "upper threshold", "kept fraction", "lm loss", "grad-norm"):
        assert len(set(expected[name][1])) > 1, f"{name} does not change"
        assert resumed[name][0] == expected[name][0]
        assert resumed[name][1] == pytest.approx(expected[name][1], rel=1e-5), name


def resume(sft, hf, plan, layouts, folder, objective=CASE.flags) -> None:
    """Train to iteration 3 at one layout, then to the end at another."""
    interrupted = ("--save", folder / "save", "--save-interval", 3, "--exit-interval", 3)
    for layout, more in zip(layouts, (interrupted, ("--load", folder / "save")), strict=True):
        ranks, flags = parse(layout)
        sft(
            *(ranks, "--hf-model", hf, *plan.flags, *objective, *flags, *more),
            *("--tensorboard-dir", folder / "tensorboard"),
        )
