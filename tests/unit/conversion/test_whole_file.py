"""Files that appear whole, whoever else writes them, and folders that vanish whole."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from checkpoint_conversion.engine.output import remove_folder, whole_file


def test_writers_of_the_same_file_do_not_disturb_each_other(tmp_path):
    file = tmp_path / "command.sh"
    with whole_file(file) as slow:
        slow.write(b"slow")
        with whole_file(file) as fast:
            fast.write(b"fast")
        assert file.read_bytes() == b"fast"
        with pytest.raises(TypeError), whole_file(file) as failing:
            failing.write("text")
    assert file.read_bytes() == b"slow", "the last one to finish counts"
    assert [left.name for left in tmp_path.iterdir()] == ["command.sh"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="pipe is a pipe; name a file"), whole_file(pipe):
        pass
    assert pipe.is_fifo()
    (tmp_path / "link").symlink_to(os.devnull)
    with (
        pytest.raises(OSError, match="link is a device; name a file"),
        whole_file(tmp_path / "link"),
    ):
        pass


def test_the_rest_of_a_writer_that_died_long_ago_is_removed_and_a_younger_one_stays(tmp_path):
    old, young, other = (
        tmp_path / f".{name}.unfinished" for name in ("a[1].0123", "a[1].4567", "a1.89ab")
    )
    for file in (old, young, other):
        file.write_bytes(b"half")
    two_days_ago = time.time() - 48 * 3600
    for file in (old, other):
        os.utime(file, (two_days_ago, two_days_ago))
    with whole_file(tmp_path / "a[1]") as stream:
        stream.write(b"whole")
    assert not old.exists()
    assert young.exists(), "it may be being written on another machine"
    assert other.exists(), "of another file"


def test_a_removal_that_is_interrupted_leaves_no_part_of_the_folder(tmp_path, monkeypatch):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove_folder(folder)
    assert not folder.exists()
    folder.mkdir()
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == [], "the next removal removes the rest of the first"
    remove_folder(folder)
