"""A run goes on when its console or its curves cannot be written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from megatron_profit.megatron_patches.enduring import Enduring, Guard, reason


class Writer:
    """Fails from the second call on."""

    name = "events"

    def __init__(self) -> None:
        self.calls = 0

    def add(self, value: int) -> int:
        self.calls += 1
        if self.calls > 1:
            raise OSError(errno.ENOSPC, "No space left on device", "/curves/events")
        return value

    def flush(self) -> int:
        self.calls += 1
        return 1


def test_the_first_failure_is_told_and_nothing_is_tried_again(capsys):
    writer = Writer()
    enduring = Enduring(writer, Guard("the curves"))
    assert enduring.name == "events"
    assert [enduring.add(7), enduring.add(8), enduring.add(9), enduring.flush()] == [7, *[None] * 3]
    assert writer.calls == 2
    assert capsys.readouterr().out == (
        "WARNING: the curves cannot be written (OSError 28, No space left on device: /curves/events); the "
        "run goes on without it\n"
    )


def test_the_reason_of_an_error_is_the_one_of_the_operating_system():
    error = RuntimeError("unexpected pos 704")
    error.__context__ = AssertionError()
    error.__context__.__cause__ = OSError(errno.ENOSPC, "full", "f")
    assert reason(error) == "OSError 28, No space left on device: f"
    assert reason(ValueError("two\nlines")) == "ValueError: two"


CHATTY = """
import os, sys
from megatron_profit.megatron_patches.enduring import endure_console
endure_console()
for i in range(2000):
    print("line", i, flush=True)
os.system("echo from another program")
print("to the end", file=sys.stderr)
"""


def run(command: str, **files: object) -> subprocess.CompletedProcess:
    program = [sys.executable, "-c", CHATTY]
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" "$@" {command}', *program],
        capture_output=True,
        text=True,
        timeout=60,
        **files,
    )


def test_a_pipe_that_nobody_reads_ends_no_run():
    result = run("| head -n 2")
    assert (result.returncode, result.stdout) == (0, "line 0\nline 1\n")
    warning, last = result.stderr.splitlines()
    assert warning == (
        "WARNING: stdout cannot be written (OSError 32, Broken pipe); the run goes on without it"
    )
    assert last == "to the end"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_under_the_console_ends_no_run():
    result = run("> /dev/full")
    assert result.returncode == 0
    assert "No space left on device" in result.stderr.splitlines()[0]
    assert result.stderr.count("cannot be written") == 1
    assert run("2> /dev/full").stdout.count("line") == 2000


def test_what_is_printed_never_lands_in_a_file_that_took_the_number_of_a_closed_console(tmp_path):
    script = CHATTY.replace("for i", f"kept = open({str(tmp_path / 'kept')!r}, 'w')\nfor i")
    command = ["bash", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, "-c", script]
    assert subprocess.run(command, timeout=60).returncode == 0
    assert (tmp_path / "kept").read_text() == ""
