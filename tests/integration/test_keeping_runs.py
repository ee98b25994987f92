"""Runs that remove checkpoints, stop early and export their best weights."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from killable_runs import Job, assert_same_tensors, steps
from safetensors.numpy import load_file

from checkpoint_conversion.megatron_to_hf import megatron_to_hf

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
PATIENCE = 2


@pytest.fixture
def command(tiny, tmp_path):
    """A run that learns at first, and unlearns when its rate has risen too far."""

    def make(name: str, *flags: object) -> list[object]:
        save = tmp_path / name
        return [
            *("--hf-model", tiny, "--random-init", "--data", DATA / "arithmetic_base.jsonl"),
            *("--objective", "sft", "--seq-length", 48, "--micro-batch-size", 4),
            *("--global-batch-size", 8, "--lr", 1, "--lr-warmup-iters", 39, "--train-iters", 40),
            *("--valid-data", DATA / "arithmetic_heldout.jsonl", "--eval-iters", 2),
            *("--eval-interval", 2, "--save-interval", 2, "--save", save, "--load", save),
            *("--keep-last", 1, "--keep-best", "lm loss", "--early-stop", PATIENCE, *flags),
        ]

    return make


def evaluated(output: str) -> dict[int, float]:
    """The plain loss of each evaluation within the training, by iteration."""
    pattern = r"validation loss at iteration (\d+) \|.*?lm loss value: (\S+)"
    return {int(number): float(loss) for number, loss in re.findall(pattern, output)}


def kept(save: Path) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in save.glob("iter_*"))


def assert_stopped_early(output: str, save: Path) -> tuple[int, int]:
    losses = evaluated(output)
    best, last = min(losses, key=losses.get), max(losses)
    assert last == best + 2 * PATIENCE < 40
    assert list(steps(output))[-1] == last
    assert f"> stopped after iteration {last} of 40" in output
    (told,) = re.findall(r"the best was (\S+) after", output)
    assert float(told) == pytest.approx(losses[best], rel=1e-6)
    assert {best, last} <= set(kept(save))
    return best, last


def test_a_run_stops_early_and_exports_its_best_checkpoint(command, tiny, tmp_path):
    flags = ("--export-hf", tmp_path / "hf", "--export-best")
    job = Job(1, command("run", *flags), tmp_path / "log")
    assert job.end() == 0, job.output[-6000:]
    best, last = assert_stopped_early(job.output, tmp_path / "run")
    assert kept(tmp_path / "run") == [best, last]
    megatron_to_hf(tmp_path / "run", tiny, tmp_path / "converted", iteration=best)
    exported, expected = (
        load_file(tmp_path / n / "model.safetensors") for n in ("hf", "converted")
    )
    assert all((exported[name] == weight).all() for name, weight in expected.items())

    again = Job(1, command("run", *flags), tmp_path / "again.log")
    assert again.end() == 0, again.output[-6000:]
    assert steps(again.output) == {}
    repeated = load_file(tmp_path / "hf" / "model.safetensors")
    assert all((repeated[name] == weight).all() for name, weight in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--async-save",)], ids=["sync", "async"])
def test_a_resumed_run_stops_where_the_uninterrupted_one_does(command, tmp_path, flags):
    layout = ("--tensor-model-parallel-size", 1, "--pipeline-model-parallel-size", 2, *flags)
    whole = Job(2, command("whole", *layout), tmp_path / "whole.log")
    assert whole.end() == 0, whole.output[-6000:]
    best, last = assert_stopped_early(whole.output, tmp_path / "whole")

    first = Job(2, command("run", *layout), tmp_path / "first.log")
    first.wait_for(lambda output: best + 1 in steps(output))
    first.send(signal.SIGUSR1, "rank")
    assert first.end() == 1
    assert "> stopped by SIGUSR1" in first.output
    resumed_at = max(steps(first.output))
    second = Job(2, command("run", *layout), tmp_path / "second.log")
    assert second.end() == 0, second.output[-6000:]
    assert steps(first.output) | steps(second.output) == steps(whole.output)
    assert f"> stopped after iteration {last} of 40" in (first.output + second.output)
    assert kept(tmp_path / "run") == sorted({best, resumed_at, last})
    newest = f"iter_{last:07d}"
    assert_same_tensors(tmp_path / "run" / newest, tmp_path / "whole" / newest)

    before = (tmp_path / "run" / newest / ".metadata").stat().st_mtime_ns
    third = Job(2, command("run", *layout), tmp_path / "third.log")
    assert third.end() == 0, third.output[-6000:]
    assert steps(third.output) == {}
    assert (tmp_path / "run" / newest / ".metadata").stat().st_mtime_ns == before
