"""PSFT on several processes follows a plain implementation on one, step by step, to its weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from layouts import assert_same_steps, parse
from plain_objectives import psft
from plain_training import Plan, Trained, train
from safetensors.torch import load_file
from tiny_models import EXAMPLES

from checkpoint_conversion.megatron_to_hf import megatron_to_hf
from checkpoint_conversion.torch_dist.checksum_list import CHECKSUMS
from megatron_profit.training.checkpoints.folder import problem_of

FILE_NAME = "old_policy.safetensors"
CASE = psft(4)
PLAN = Plan(EXAMPLES / "arithmetic_chatty.jsonl", steps=6, batch=8)
SHARDED = "2 mb2 sharded overlap"


@pytest.fixture(scope="module")
def plain(tied_model) -> Trained:
    return train(tied_model.hf, PLAN, CASE)


@pytest.fixture
def run(sft, tied_model, tmp_path):
    """Trains and gives what the run printed."""

    def run(layout: str, *more: object, **options: object) -> str:
        ranks, flags = parse(layout)
        return sft(
            *(ranks, "--hf-model", tied_model.hf, *PLAN.flags, *CASE.flags, *flags),
            *("--save", tmp_path / "save", "--tensorboard-dir", tmp_path / "tensorboard", *more),
            **options,
        ).stdout

    return run


def assert_same_training(folder: Path, hf: Path, plain: Trained) -> None:
    """The steps of a run in `folder`, and the weights that it leaves."""
    assert_same_steps(folder / "tensorboard", plain)
    assert max(step["clip fraction"] for step in plain.metrics) > 0.1, "nothing is clipped"
    megatron_to_hf(folder / "save", hf, folder / "after")
    weights = load_file(folder / "after" / "model.safetensors")
    assert weights.keys() == plain.weights.keys()
    for name, weight in plain.weights.items():
        # Each of the steps rounds a weight of about 1 once, beside the rounding of its gradient.
        torch.testing.assert_close(
            weights[name].double(), weight, rtol=2e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("layout", [SHARDED, pytest.param("2 pp2 mb2", marks=pytest.mark.slow)])
def test_every_step_is_that_of_a_plain_implementation(run, tied_model, plain, tmp_path, layout):
    run(layout)
    assert_same_training(tmp_path, tied_model.hf, plain)


def test_a_run_resumes_inside_an_outer_batch(run, tied_model, plain, tmp_path):
    save = tmp_path / "save"
    valid = ("--valid-data", EXAMPLES / "arithmetic_heldout.jsonl", "--eval-interval", 3)
    flags = ["--load", save, *valid]
    run(SHARDED, *flags, "--save-interval", 2, "--exit-interval", 2)
    assert (save / "iter_0000002" / FILE_NAME).is_file()
    second = run(SHARDED, *flags)
    assert_same_training(tmp_path, tied_model.hf, plain)
    # In an evaluation the old policy is the current one, and what is reported is plain SFT.
    objective, plain_loss = (
        [float(v) for v in re.findall(rf"validation loss at .*\| {name} value: (\S+)", second)]
        for name in ("objective", "lm loss")
    )
    assert objective == pytest.approx(plain_loss, rel=1e-6)
    assert len(objective) == 3

    (save / "latest_checkpointed_iteration.txt").write_text("2")
    other_data = ("--data", EXAMPLES / "arithmetic_base.jsonl")
    refused = run(SHARDED, *flags, *other_data, "--allow-change", "data", check=False)
    assert re.search(
        r"saved inside an outer batch of PSFT, which cannot go on with other data; resume", refused
    )
    (save / "iter_0000002" / FILE_NAME).unlink()
    assert f"{FILE_NAME}: missing" in problem_of(save / "iter_0000002")
    (save / "iter_0000002" / CHECKSUMS).unlink()
    refused = run(SHARDED, *flags, check=False)
    assert re.search(r"iteration 2 is inside an outer batch of 4 steps, but .* is missing", refused)
