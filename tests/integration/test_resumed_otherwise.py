"""Runs that go on with other flags than before: longer, faster, or on something else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from checkpoint_conversion.megatron_to_hf import megatron_to_hf

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"


@pytest.fixture
def flags(tiny) -> list[object]:
    return [
        *("--hf-model", tiny, "--random-init", "--data", DATA / "arithmetic_base.jsonl"),
        *("--seq-length", 48, "--micro-batch-size", 4, "--global-batch-size", 8, "--lr", 1e-3),
        *("--objective", "sft"),
    ]


def losses(output: str) -> dict[int, str]:
    lines = re.findall(r"iteration +(\d+)/ *\d+ \|.*? lm loss: (\S+) \|", output)
    return {int(step): loss for step, loss in lines}


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of change of each file in a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize(
    ("world_size", "optimizer"),
    [(1, ""), pytest.param(2, "--bf16 --use-distributed-optimizer", marks=pytest.mark.slow)],
    ids=["fp32", "bf16-distributed"],
)
def test_a_finished_run_goes_on_with_more_steps_and_with_another_learning_rate(
    sft, flags, tiny, tmp_path, world_size, optimizer
):
    command = [*flags, *optimizer.split()]
    whole = losses(sft(world_size, *command, "--train-iters", 6).stdout)
    run = [*command, "--load", tmp_path / "run", "--save", tmp_path / "run"]
    first = sft(world_size, *run, "--train-iters", 3).stdout
    assert "a checkpoint takes about" in first
    more = sft(world_size, *run, "--train-iters", 6).stdout
    assert "--train-iters 6 (was 3)" in more
    assert "> learning rate from step 4 on: constant at 0.001, 0 of warm-up" in more
    assert losses(first) | losses(more) == whole, "optimizer, order of the data, learning rate"

    again = sft(world_size, *run, "--train-iters", 6).stdout
    assert losses(again) == {}
    assert "> there is nothing left to train" in again
    refused = sft(world_size, *run, "--train-iters", 6, "--lr", 0.5, check=False)
    assert refused.returncode == 2
    assert "so no step would be made with other settings: --lr 0.5 (was 0.001)" in refused.stdout

    # With a learning rate of 0, the weights stay those of step 6.
    exported = ("--export-hf", tmp_path / "hf")
    still = sft(
        world_size, *run, "--train-iters", 8, "--lr", 0, "--adam-beta2", 0.5, *exported
    ).stdout
    assert list(losses(still)) == [7, 8]
    assert "--lr 0.0 (was 0.001)" in still
    assert "--adam-beta2 0.5 (was 0.999)" in still
    megatron_to_hf(tmp_path / "run", tiny, tmp_path / "converted", iteration=6)
    kept, expected = (load_file(tmp_path / f / "model.safetensors") for f in ("hf", "converted"))
    assert all((kept[name] == weight).all() for name, weight in expected.items())


def test_a_run_does_not_go_on_with_something_else_and_none_is_overwritten(sft, flags, tmp_path):
    run, other = tmp_path / "run", DATA / "arithmetic_chatty.jsonl"
    going_on = [*flags, "--load", run, "--save", run]
    sft(1, *flags, "--save", run, "--train-iters", 2)
    (marker,) = run.glob("iter_*/megatron_profit.json")
    record = json.loads(marker.read_text())["run"]
    assert record["objective"]["name"] == "sft"
    assert record["data"]["sources"] == [str(DATA / "arithmetic_base.jsonl")]
    assert record["seed"] == {"seed": 1234}
    before = files(run)
    for command, message in (
        ([*flags, "--save", run, "--train-iters", 2], f"--save {run} holds a run already"),
        ([*going_on, "--train-iters", 1], "has made 2 steps, more than --train-iters 1"),
        ([*going_on, "--train-iters", 4, "--seed", 7], "--seed 7 (was 1234)"),
        ([*going_on, "--train-iters", 4, "--data", other], "--data has other records"),
        ([*going_on, "--train-iters", 4, "--objective", "dft"], "--objective dft (was sft)"),
        ([*going_on, "--train-iters", 4, "--optimizer", "sgd"], "--optimizer sgd (was adam)"),
    ):
        refused = sft(1, *command, check=False)
        assert refused.returncode == 2, refused.stdout
        last = refused.stdout.splitlines()[-1]
        assert last.startswith("megatron-profit-sft: error: ")
        assert message in last
        assert "Traceback" not in refused.stdout
    changed = {path.name for path, state in files(run).items() if before.get(path) != state}
    assert changed <= {".in_use"}

    allowed = ("--data", other, "--seed", 7, "--allow-change", "data", "seed")
    assert list(losses(sft(1, *going_on, "--train-iters", 3, *allowed).stdout)) == [3]
    replaced = sft(1, *flags, "--save", run, "--overwrite", "--train-iters", 1).stdout
    assert f"> removed the run in {run} (--overwrite)" in replaced
    assert [folder.name for folder in run.glob("iter_*")] == ["iter_0000001"]
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").open()]
    assert kinds == ["start", "train"]


def test_momenta_of_sgd_come_back(sft, flags, tmp_path):
    command = [*flags, "--optimizer", "sgd", "--lr", 1e-2]
    whole = losses(sft(1, *command, "--train-iters", 4).stdout)
    run = [*command, "--load", tmp_path / "run", "--save", tmp_path / "run"]
    first = losses(sft(1, *run, "--train-iters", 2).stdout)
    assert first | losses(sft(1, *run, "--train-iters", 4).stdout) == whole


def test_a_run_goes_on_with_smaller_batches_and_rarer_evaluations(sft, flags, tmp_path):
    run = [*flags, "--load", tmp_path / "run", "--save", tmp_path / "run", "--valid-split", 0.1]
    sft(1, *run, "--train-iters", 4, "--eval-interval", 1)
    smaller = ("--micro-batch-size", 2, "--global-batch-size", 2, "--eval-interval", 3)
    more = sft(1, *run, *smaller, "--train-iters", 6).stdout
    assert "the next row is number 32" in more
    assert list(losses(more)) == [5, 6]
    assert "validation loss at iteration 6" in more
