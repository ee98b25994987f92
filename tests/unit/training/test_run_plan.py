"""The plan of a run: `derive` reads no file, and bad input is raised for a caller to catch."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_tiny_model import TinyShape, make_tiny_model
from safetensors.torch import load_file, save_file

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.folder import read_header
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from megatron_profit.estimates.published import published_config
from megatron_profit.flags import ArgumentsError
from megatron_profit.training.arguments.derive import derive
from megatron_profit.training.plan import plan_run

DATA = Path(__file__).resolve().parents[3] / "examples" / "data" / "arithmetic_heldout.jsonl"
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


def test_a_list_that_is_given_twice_is_told(capsys):
    with pytest.raises(ArgumentsError):
        plan_run(["--hf-model", "x", "--data", "y", "--data", "z"], "cpu")
    printed = capsys.readouterr()
    assert "--data is given more than once; the last one counts" in printed.out + printed.err


def test_a_run_notes_the_tensors_that_it_does_not_train(tmp_path, capsys):
    """They are compared with the checkpoint that the run starts from, before any work."""
    shape = TinyShape(
        hidden_size=32, intermediate_size=24, head_dim=16, family="qwen3.5-vision", tied=False
    )
    hf = make_tiny_model(tmp_path / "hf", [DATA], shape)
    command = (
        f"--hf-model {hf} --data {DATA} --seq-length 64 --micro-batch-size 2 --lr 1e-5 "
        f"--train-iters 2 --objective sft --export-hf {tmp_path / 'out'}"
    ).split()
    plan = plan_run(command, "cpu")
    carried = {name for name in read_header(hf / "model.safetensors") if "visual" in name}
    assert set(plan.carried) == carried
    assert plan.files.export.carried_notes == plan.carried
    line = f"> carried along unchanged, not trained: model.visual ({len(carried)} tensors"
    assert line in capsys.readouterr().out
    hf_to_megatron(hf, tmp_path / "megatron")
    start = ["--pretrained-checkpoint", str(tmp_path / "megatron")]
    assert plan_run([*command, *start], "cpu").carried == plan.carried
    file = hf / "model.safetensors"
    content = load_file(file)
    content["model.visual.pos_embed.weight"] += 1
    save_file(content, file, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"pos_embed\.weight has changed since it was noted"):
        plan_run([*command, *start], "cpu")
