"""A folder of checkpoints belongs to one run, until its process ends."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import pytest

from checkpoint_conversion.engine import lock
from megatron_profit.training.checkpoints import save_lock
from megatron_profit.training.checkpoints.folder import CheckpointError
from megatron_profit.training.checkpoints.save_lock import NAME, hold, hold_new, hold_still

HOLDER = """
import sys
from pathlib import Path
from megatron_profit.training.checkpoints.save_lock import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def first_rank(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    yield
    for file in save_lock._held.values():
        file.close()
    save_lock._held.clear()


@pytest.fixture
def other_run(tmp_path):
    """Another process that has the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_until_the_first_is_dead(other_run, tmp_path, capsys):
    save = tmp_path / "run"
    with pytest.raises(
        CheckpointError, match=rf"in use by another run \(process {other_run.pid} on"
    ):
        hold(save, patience=0.3)
    assert "waiting for the run" in capsys.readouterr().out
    other_run.kill()
    hold(save)
    hold(save)


def test_only_the_first_rank_holds(other_run, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    hold(tmp_path / "run", patience=0)


def test_a_folder_is_made_or_refused(tmp_path):
    hold(tmp_path / "deep" / "run")
    assert (tmp_path / "deep" / "run").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        hold(tmp_path / "file" / "run")


def test_a_run_that_came_in_between_is_not_passed_over(tmp_path):
    hold_new(tmp_path / "empty")
    (tmp_path / "used" / "iter_0000003").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="another run has written checkpoints"):
        hold_new(tmp_path / "used")
    assert not hold(tmp_path / "empty")
    hold_new(tmp_path / "empty")


def test_the_folder_is_held_although_nothing_can_be_written(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save_lock.os, "fsync", fsync)
    assert hold(tmp_path / "run")
    assert (tmp_path / "run" / NAME).exists()


def test_another_error_of_the_lock_is_named(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    with pytest.raises(CheckpointError, match="cannot be locked: Input/output error"):
        hold(tmp_path / "run")


def test_without_locks_a_run_is_warned(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    hold(tmp_path / "run")
    assert "without locks" in capsys.readouterr().out


def test_a_folder_that_is_removed_meanwhile_is_made_and_held_anew(tmp_path, capsys):
    save = tmp_path / "run"
    hold(save)
    hold_still(save)
    assert capsys.readouterr().out == ""
    shutil.rmtree(save)
    hold_still(save)
    assert (
        f"{save} was removed while the run was going on; it is made anew" in capsys.readouterr().out
    )
    assert (save / NAME).exists()
    hold_still(save)
    assert capsys.readouterr().out == ""


def test_a_lock_file_that_is_removed_alone_is_made_anew_among_the_checkpoints(tmp_path, capsys):
    save = tmp_path / "run"
    hold(save)
    (save / "iter_0000003").mkdir()
    (save / NAME).unlink()
    hold_still(save)
    assert (save / NAME).exists()
    assert capsys.readouterr().out == ""


def test_a_folder_that_another_run_has_taken_meanwhile_is_left_to_it(tmp_path, other_run):
    own = tmp_path / "own"
    hold(own)
    shutil.rmtree(own)
    (tmp_path / "run").rename(own)
    with pytest.raises(
        CheckpointError, match=f"in use by another run \\(process {other_run.pid} on"
    ):
        hold_still(own)


def test_checkpoints_that_another_run_has_left_meanwhile_are_not_written_over(tmp_path):
    save = tmp_path / "run"
    hold(save)
    shutil.rmtree(save)
    (save / "iter_0000003").mkdir(parents=True)
    (save / "iter_0000003" / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match="another run has written checkpoints there"):
        hold_still(save)


@pytest.mark.parametrize("kind", ["a symbolic link", "a pipe", "a folder"])
def test_a_lock_is_a_regular_file(tmp_path, kind):
    (tmp_path / "mine").write_text("mine")
    if kind == "a symbolic link":
        (tmp_path / NAME).symlink_to(tmp_path / "mine")
    elif kind == "a pipe":
        os.mkfifo(tmp_path / NAME)
    else:
        (tmp_path / NAME).mkdir()
    with pytest.raises(CheckpointError, match=rf"--save .*{kind}|Is a directory"):
        hold(tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"
