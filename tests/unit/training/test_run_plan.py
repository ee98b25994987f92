"""The plan of a run: `derive` reads no file, and bad input is raised for a caller to catch."""

from __future__ import annotations

import pytest

from megatron_profit.estimates.published import published_config
from megatron_profit.flags import ArgumentsError
from megatron_profit.training.arguments.derive import derive
from megatron_profit.training.plan import plan_run

FLAGS = (
    "--hf-model nowhere --data none.jsonl --seq-length 64 --micro-batch-size 2 --lr 1e-5 "
    "--train-iters 9 --objective dft"
).split()
CONFIG = published_config("Qwen3-0.6B")


def test_settings_follow_from_flags_and_config_without_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["a program", "--lr", "7"])
    folders = "--save run --load run --export-hf out --tensorboard-dir curves".split()
    layout = "--tensor-model-parallel-size 2 --global-batch-size 8".split()
    settings = derive([*FLAGS, *folders, *layout], "cuda", 4, CONFIG)
    assert (settings.values["lr"], settings.values["num_layers"]) == (1e-5, 28)
    assert (settings.batch_size, settings.steps) == (8, 9)
    assert settings.objective.name == "dft"
    assert settings.given.keys() < settings.values.keys()
    assert list(tmp_path.iterdir()) == []


def test_without_a_batch_size_each_replica_has_one_micro_batch():
    layout = ["--tensor-model-parallel-size", "2"]
    assert derive([*FLAGS, *layout], "cuda", 8, CONFIG).batch_size == 2 * 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--stall-steps", "0"], "--stall-steps is 0"),
        (["--keep-last", "0"], "--keep-last is 0"),
        (["--ref-cache", "x"], "--ref-cache is for objectives with a reference model"),
        (["--psft-steps-per-refresh", "4"], "is for --objective psft, not for --objective dft"),
    ],
)
def test_a_wrong_flag_is_an_error_of_flags_before_any_file_is_touched(
    tmp_path, monkeypatch, flags, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentsError, match=message):
        derive([*FLAGS, "--save", "run", *flags], "cpu", 1, CONFIG)
    (tmp_path / "run").mkdir()
    with pytest.raises(ArgumentsError, match=r"--micro-batch-size, --lr, .* are missing"):
        plan_run(["--hf-model", "x", "--data", "y", "--seq-length", "8", "--save", "run"], "cpu")
    assert list((tmp_path / "run").iterdir()) == []
