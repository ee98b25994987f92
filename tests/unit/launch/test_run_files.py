"""The files of a run's folder that say how it was started."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_profit.launch import front, processes
from megatron_profit.launch.prepare import Launch
from megatron_profit.launch.run_folder import RunFolder, folder_of, script
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.recipe.flags import words_of
from megatron_profit.recipe.request import read_request

COMMAND = ["--model", "some/model", "--data", "chats.jsonl"]


@pytest.fixture
def ready(tmp_path):
    """A run that is ready to start, and whose folder does not exist."""
    return SimpleNamespace(
        lines=(),
        words=["-m", "megatron_profit.sft"],
        config="model: new\n",
        request=read_request(COMMAND),
        run=RunFolder(tmp_path / "run"),
        processes=1,
        machine=SimpleNamespace(cores=1),
        checkpoint=200_000_000_000,
    )


def started(ready, monkeypatch, code: int) -> int:
    monkeypatch.setattr(processes, "start", lambda *_: code)
    return front._run(ready)


def with_checkpoint(run: RunFolder) -> None:
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / "latest_checkpointed_iteration.txt").write_text("3")
    run.config.write_text("model: old\n")


def test_a_new_run_has_its_files_from_the_start(ready, monkeypatch):
    assert started(ready, monkeypatch, 1) == 1
    assert ready.run.config.read_text() == "model: new\n"
    text = ready.run.command.read_text()
    assert "exec torchrun" in text
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-520}" in text, "200 seconds twice, and 2 minutes"


def test_a_refused_command_leaves_the_files_of_the_run_as_they_are(ready, monkeypatch):
    with_checkpoint(ready.run)
    assert started(ready, monkeypatch, front.REFUSED) == 2
    assert ready.run.config.read_text() == "model: old\n"
    assert not ready.run.command.exists()


def test_a_run_that_has_gone_on_has_the_files_of_its_last_start(ready, monkeypatch):
    with_checkpoint(ready.run)
    assert started(ready, monkeypatch, 0) == 0
    assert ready.run.config.read_text() == "model: new\n"


@pytest.mark.parametrize("replaces", [False, True])
def test_a_start_that_does_not_replace_a_run_leaves_its_files(ready, monkeypatch, replaces):
    """Else the next plain command goes on with the flags of the start that failed."""
    ready.request = read_request([*COMMAND, "--overwrite"])
    with_checkpoint(ready.run)

    def start(*_):
        assert ready.run.config.read_text() == "model: new\n"
        if replaces:
            tracker = ready.run.checkpoints / "latest_checkpointed_iteration.txt"
            tracker.unlink()
            tracker.write_text("3")
        return 1

    monkeypatch.setattr(processes, "start", start)
    assert front._run(ready) == 1
    assert ready.run.config.read_text() == ("model: new\n" if replaces else "model: old\n")


def test_a_refused_start_leaves_the_files_of_a_run_that_has_no_checkpoint_yet(ready, monkeypatch):
    """That run may be training; when it goes on, it reads its rows from these files."""
    ready.run.write(["torchrun", "first"], "model: old\n")
    assert started(ready, monkeypatch, front.REFUSED) == 2
    assert ready.run.config.read_text() == "model: old\n"
    assert "first" in ready.run.command.read_text()

    def no_meeting(*_):
        raise LaunchError("the nodes cannot meet")

    monkeypatch.setattr(processes, "start", no_meeting)
    with pytest.raises(LaunchError):
        front._run(ready)
    assert ready.run.config.read_text() == "model: old\n"
    assert started(ready, monkeypatch, 1) == 1
    assert ready.run.config.read_text() == "model: new\n", "this one has trained, and failed"


@pytest.mark.parametrize("name", ["config.yaml", "command.sh"])
def test_a_folder_with_files_of_ones_own_is_refused(tmp_path, name):
    run = RunFolder(tmp_path)
    (tmp_path / name).write_text("mine")
    with pytest.raises(LaunchError, match=f"{name} was not written by a run and would be replaced"):
        run.check_place()
    (tmp_path / name).unlink()
    run.write(["torchrun"], "model: ours\n")
    run.check_place()


def test_the_script_starts_the_command_in_the_folder_where_it_was_given(tmp_path, monkeypatch):
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    text = script(["sh", "-c", "pwd; echo $0", "--word with spaces"])
    monkeypatch.chdir(tmp_path)
    result = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [str(folder), "--word with spaces"]


@pytest.mark.parametrize(
    "more",
    [
        "--verbose --without=--export-hf --without=--bf16 --nnodes 1:4 --rdzv-endpoint a:1",
        "--rank-logs --max-restarts 2",
        "--no-load-optim --no-packing --disable-bias-linear --eval-flags=--greedy",
        "--objective my.module:Class --my-option=3 --my-switch --gpus 8 --gpu-memory 79.5",
        "--exit-signal SIGUSR1 --objective-schedule clip_low linear 0.1 5 --lr 1e-5",
    ],
)
def test_the_written_file_is_read_as_the_same_request(more, tmp_path):
    request = read_request([*COMMAND, *more.split()])
    flags = list(request.given.values())
    run = RunFolder(tmp_path / "run")
    launch = Launch(request, SimpleNamespace(), run, flags, (), 1, 1, 1, 1, ())
    run.write(["x"], launch.config)
    again = read_request(["--config", str(run.config)])
    assert sorted(words_of(again.given.values())) == sorted(words_of(flags))
    front_flags = {**vars(request.front), "run": str(run.path), "config": [str(run.config)]}
    assert vars(again.front) == front_flags


@pytest.mark.parametrize("flag", ["--overwrite", "--ckpt-step=3"])
def test_the_written_file_does_not_repeat_what_one_start_was_about(flag, tmp_path):
    """A start from the file would replace the run that it says how to go on with."""
    request = read_request([*COMMAND, flag])
    flags = list(request.given.values())
    launch = Launch(request, SimpleNamespace(), RunFolder(tmp_path), flags, (), 1, 1, 1, 1, ())
    (tmp_path / "config.yaml").write_text(launch.config)
    again = read_request(["--config", str(tmp_path / "config.yaml")])
    assert again.given.keys() == {"data"}


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match="file is a file; name a folder"):
        RunFolder(tmp_path / "file" / "run").check_place()


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen3-4B@v1", "Qwen3-4B-profit-chats"),
        ("https://huggingface.co/Qwen/Qwen3-4B/tree/main", "Qwen3-4B-profit-chats"),
        ("../my model/", "my_model-profit-chats"),
    ],
)
def test_a_run_is_named_after_model_objective_and_data(model, name):
    request = read_request(["--model", model, "--data", "x/chats.jsonl.gz"])
    assert folder_of(request).path.name == name


@pytest.mark.parametrize(
    ("flags", "is_resumed"),
    [
        ("", True),
        ("--load RUN/checkpoints", True),
        ("--load other", False),
        ("--without=--load --overwrite", False),
        ("--overwrite", False),
        ("--without=--save", False),
        ("--save RUN/elsewhere", False),
        ("--save RUN/checkpoints", True),
    ],
)
def test_a_run_goes_on_where_its_own_checkpoints_are_loaded(tmp_path, flags, is_resumed):
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    (run.checkpoints / "latest_checkpointed_iteration.txt").write_text("3")
    words = flags.replace("RUN", str(tmp_path)).split()
    request = read_request(["--model", "m", "--data", "d.jsonl", *words])
    assert run.is_resumed(request) is is_resumed


@pytest.mark.parametrize(
    ("flags", "export"),
    [("", "hf"), ("--export-hf other", "other"), ("--without=--export-hf", None)],
)
def test_the_export_that_is_named_at_the_end_is_the_commands(
    flags, export, ready, monkeypatch, capsys
):
    """RUN/hf may hold an earlier one."""
    monkeypatch.chdir(ready.run.path.parent)
    for name in ("run/hf", "other"):
        Path(name).mkdir(parents=True)
        Path(name, "config.json").touch()
    ready.request = read_request([*COMMAND, *flags.split()])
    assert started(ready, monkeypatch, 0) == 0
    named = re.findall(r"> the trained model is in (?:\S*/)?(\S+)", capsys.readouterr().out)
    assert named == ([] if export is None else [export])


@pytest.mark.parametrize(
    ("layout", "more", "expected"),
    [
        ("distributed_optimizer: true", "", True),
        ("tensor: 8", "", False),
        ("tensor: 8", "--without=--use-distributed-optimizer", None),
    ],
)
def test_a_resumed_run_keeps_its_rows_and_the_form_of_its_optimizer(
    tmp_path, layout, more, expected
):
    """On another number of GPUs another optimizer would be derived, which cannot load the state."""
    run = RunFolder(tmp_path)
    with_checkpoint(run)
    run.config.write_text(f"training: {{global_batch_size: 4, lr: 1e-5}}\nlayout: {{{layout}}}\n")
    kept = run.remembered(read_request([*COMMAND, *more.split()]))
    values = {name: flag.value for name, flag in kept.items()}
    assert values.pop("use_distributed_optimizer", None) is expected
    assert values == {"global_batch_size": 4}
