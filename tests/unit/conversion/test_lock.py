"""The lock of files: whom it keeps out, and when it ends."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading

import pytest

from checkpoint_conversion.engine import lock
from checkpoint_conversion.engine.lock import lock_file, take_lock
from checkpoint_conversion.errors import ConversionError

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.lock"


@pytest.fixture
def holder(path):
    """Another process that holds the lock until it is killed or `leave` is set."""
    held, leave = FORK.Event(), FORK.Event()

    def hold():
        with lock_file(path):
            held.set()
            leave.wait(60)

    process = FORK.Process(target=hold)
    process.start()
    assert held.wait(60)
    process.leave = leave
    yield process
    process.kill()
    process.join()


def test_a_lock_keeps_others_out_until_it_is_left_and_leaves_no_file(path, holder):
    with pytest.raises(BlockingIOError), lock_file(path, patience=0.3):
        pass
    told = []

    def waiting():
        told.append(path)
        holder.leave.set()

    with lock_file(path, waiting=waiting) as is_locked:
        assert is_locked
        assert path.exists()
    assert told == [path]
    assert not path.exists()


def test_the_lock_of_a_killed_process_is_free(path, holder):
    holder.kill()
    holder.join()
    assert path.exists()
    with lock_file(path, patience=0) as is_locked:
        assert is_locked
    assert not path.exists()


def test_a_lock_is_free_after_an_error(path):
    with pytest.raises(ValueError, match="of the block"), lock_file(path):
        raise ValueError("of the block")
    assert not path.exists()
    with lock_file(path, patience=0):
        pass


def test_threads_of_a_process_keep_each_other_out(path):
    failed = []

    def second():
        try:
            with lock_file(path, patience=0):
                pass
        except BlockingIOError as error:
            failed.append(error)

    with lock_file(path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert len(failed) == 1
        other = FORK.Process(target=lambda: exit(take_lock(os.open(path, os.O_RDWR), 0)))
        other.start()
        other.join()
        assert other.exitcode == 0, "the thread has not released the lock"


def test_a_child_that_lives_on_does_not_keep_the_lock(path):
    release = FORK.Event()
    with lock_file(path):
        child = FORK.Process(target=release.wait, args=(60,))
        child.start()
    with lock_file(path, patience=0):
        pass
    release.set()
    child.join()


def test_a_file_system_without_locks_is_told(path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    with lock_file(path, patience=0) as is_locked:
        assert not is_locked
    assert not path.exists()


def test_a_lock_is_no_link(path, tmp_path):
    (tmp_path / "mine").write_text("mine")
    path.symlink_to(tmp_path / "mine")
    with pytest.raises(ConversionError, match="symbolic link"), lock_file(path):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
