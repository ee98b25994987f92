"""The quiet console: this project's lines are shown, others go to a file."""

from __future__ import annotations

import io
import logging
import os
import sys
import types

import pytest

from megatron_profit.training.process import quiet
from megatron_profit.training.process.console import print_rank_0, warn_rank_0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def begin(monkeypatch):
    """Return a function that makes the process quiet and returns its console, until the test ends."""

    def begin() -> io.StringIO:
        console = io.StringIO()
        monkeypatch.setattr(sys, "stdout", console)
        monkeypatch.setattr(quiet, "_quiet", None)
        monkeypatch.setattr(quiet.warnings, "showwarning", quiet.warnings.showwarning)
        monkeypatch.setattr(logging.root, "handlers", [])
        quiet.begin_quiet()
        return console

    return begin


def other_module() -> types.ModuleType:
    """A module of another package, which prints."""
    module = types.ModuleType("megatron.training.utils")
    exec("def say(text): print(text, flush=True)", module.__dict__)
    return module


def test_own_lines_are_shown_and_others_are_in_the_log(begin, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    console = begin()
    other = other_module()
    other.say("an early line")
    print_rank_0("> ours")
    warn_rank_0("be careful")
    quiet.keep_files(tmp_path, {"b": 2, "a": "x"})
    other.say("a later line")
    logging.getLogger("megatron.core").warning("a message")
    quiet.warnings.warn_explicit("old", DeprecationWarning, "f.py", 1)
    assert console.getvalue() == "> ours\nWARNING: be careful\n"
    log = (tmp_path / quiet.LOG).read_text()
    assert log.startswith("an early line\na later line\nWARNING:megatron.core:a message\n")
    assert (tmp_path / quiet.ARGUMENTS).read_text() == "a = 'x'\nb = 2\n"


def test_steps_are_lines_in_a_file_and_one_line_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file, terminal = quiet.Quiet(io.StringIO()), quiet.Quiet(Terminal())
    for console in (file, terminal):
        console.show_live("step 1")
        console.show_live("step 2")
        console.end()
    assert file._console.getvalue() == "step 1\nstep 2\n"
    assert terminal._console.getvalue() == "\rstep 1\033[K\rstep 2\033[K\n"


def test_a_live_line_fits_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    terminal = quiet.Quiet(Terminal())
    terminal.show_live("step 1/10  left 0:00:05")
    assert terminal._console.getvalue() == "\rstep 1/10  \033[K"


def test_a_terminal_that_only_adds_lines_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = quiet.Quiet(Terminal())
    terminal.show_live("step 1")
    assert terminal._console.getvalue() == "step 1\n"


def test_a_run_without_a_folder_keeps_no_files(begin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begin()
    quiet.keep_files(None, {"a": 1})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_does_not_end_a_quiet_run(begin, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    console = begin()
    # Appending to a device is refused elsewhere; the disk is full from here on.
    monkeypatch.setattr(quiet, "open_to_append", lambda file: os.open("/dev/full", os.O_WRONLY))
    quiet.keep_files(tmp_path, {"a": 1})
    other = other_module()
    for text in ("one", "two"):
        other.say(text)
    assert console.getvalue().count("megatron.log cannot be written (OSError 28") == 1


@pytest.mark.parametrize("name", [quiet.LOG, quiet.ARGUMENTS])
def test_the_files_of_a_quiet_run_are_not_written_through_links(begin, tmp_path, monkeypatch, name):
    monkeypatch.setenv("RANK", "0")
    console = begin()
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    folder.mkdir()
    (folder / name).symlink_to(precious)
    quiet.keep_files(folder, {"a": 1})
    other_module().say("a line")
    assert precious.read_text() == "mine"
    assert ("is a symbolic link" in console.getvalue()) is (name == quiet.LOG)
