"""Folders with checksums: any damage to a file is found, and the check is shared by processes."""

import multiprocessing
import os
import time

import numpy as np
import pytest

from megatron_profit.data.store import checksums
from megatron_profit.data.store.checksums import CheckedFiles, is_usable

NAMES = ("ids", "about.json")


@pytest.fixture
def folder(tmp_path):
    with CheckedFiles(tmp_path / "folder") as files:
        files.append("ids", np.arange(1000, dtype=np.int32))
        files.append("about.json", b'{"a": 1}')
        files.append("ids", np.zeros(0, dtype=np.int32))
        files.append("ids", np.arange(7, dtype=np.int32)[::2])
        files.finish()
    return tmp_path / "folder"


def put_aside(folder):
    return list(folder.parent.glob(f"{folder.name}.damaged-*"))


def test_files_are_written_piece_by_piece_and_found_whole(folder, capsys):
    expected = [*range(1000), 0, 2, 4, 6]
    assert np.fromfile(folder / "ids", dtype=np.int32).tolist() == expected
    for _ in range(2):
        assert is_usable(folder, NAMES)
    assert not put_aside(folder)
    assert capsys.readouterr().err == ""


def test_a_folder_that_is_not_there_is_not_usable(tmp_path, capsys):
    assert not is_usable(tmp_path / "none", NAMES)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", [*NAMES, "checksums.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "empty", "removed", "swapped", "pipe"])
def test_any_damage_is_found_and_put_aside(folder, capsys, name, damage):
    file = folder / name
    content = file.read_bytes()
    changed = {
        "flip": content[:5] + bytes([content[5] ^ 4]) + content[6:],
        "cut": content[:-1],
        "longer": content + b" ",
        "empty": b"",
        "swapped": content[::-1],
    }
    if damage in changed:
        file.write_bytes(changed[damage])
    else:
        file.unlink()
        if damage == "pipe":
            os.mkfifo(file)
    harmless = name == "checksums.json" and damage == "longer"  # JSON may end in a space
    assert is_usable(folder, NAMES) == harmless
    assert len(put_aside(folder)) == (not harmless)
    assert folder.exists() == harmless
    said = capsys.readouterr().err
    assert said.count("\n") == (not harmless)
    if not harmless:
        assert f"WARNING: {folder} is damaged ({name}" in said
        assert put_aside(folder)[0].name in said


def test_every_single_bit_counts(folder, monkeypatch):
    monkeypatch.setattr(checksums, "_put_aside", lambda *_: None)
    content = (folder / "about.json").read_bytes()
    for place in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        (folder / "about.json").write_bytes(flipped)
        assert not is_usable(folder, NAMES)


def test_a_whole_folder_in_the_place_of_another_is_found(folder, capsys):
    other = folder.with_name("other")
    folder.rename(other)
    assert not is_usable(other, NAMES)
    assert "other is damaged (it holds what was written as 'folder')" in capsys.readouterr().err


def test_a_folder_is_written_under_another_suffix(tmp_path):
    with CheckedFiles(tmp_path / "abc.unfinished-1") as files:
        files.append("ids", b"1")
        files.finish()
    (tmp_path / "abc.unfinished-1").rename(tmp_path / "abc")
    assert is_usable(tmp_path / "abc", ["ids"])


def test_an_unfinished_folder_is_not_usable(tmp_path, capsys):
    with CheckedFiles(tmp_path / "folder") as files:
        files.append("ids", b"1")
    assert not is_usable(tmp_path / "folder", ["ids"])
    assert "checksums.json cannot be used" in capsys.readouterr().err


def _check_slowly(folder, log, barrier):
    check = checksums._check

    def slow(*args):
        with log.open("a") as file:
            file.write("checked\n")
        time.sleep(1)
        check(*args)

    checksums._check = slow
    barrier.wait()
    assert is_usable(folder, NAMES)


def _at_once(count, *arguments):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count)
    processes = [
        context.Process(target=_check_slowly, args=(*arguments, barrier)) for _ in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_processes_that_start_together_read_the_files_once(folder, tmp_path):
    log = tmp_path / "log"
    assert _at_once(3, folder, log) == [0, 0, 0]
    assert log.read_text() == "checked\n"
    assert _at_once(2, folder, log) == [0, 0]
    assert log.read_text() == "checked\n" * 2, "once for each start"


def test_a_check_that_did_not_end_is_made_again(folder, tmp_path, monkeypatch):
    class Interrupted(Exception):
        pass

    def interrupted(*_):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(checksums, "_check", interrupted)
        with pytest.raises(Interrupted):
            is_usable(folder, NAMES)
    (folder / "ids").write_bytes(b"")
    assert not is_usable(folder, NAMES)


def test_a_folder_that_may_only_be_read_is_checked_all_the_same(folder, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    assert is_usable(folder, NAMES)
    (folder / "ids").write_bytes(b"")
    assert not is_usable(folder, NAMES)


def test_progress_is_told_where_it_takes_long(folder, monkeypatch):
    monkeypatch.setattr(checksums, "_PROGRESS_SECONDS", -1)
    told = []
    assert is_usable(folder, NAMES, told.append)
    assert told[-1] == f"checking {folder}: 0.0 of 0.0 GB"
