"""Signals that end a run: a checkpoint first, at once when they come again, and never in its helpers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from megatron.training.dist_signal_handler import DistributedSignalHandler

from megatron_profit.training import main
from megatron_profit.training.process import exit_signals, interrupts
from megatron_profit.training.process.exit_signals import ExitSignals

SAVED = 5


def training(flag: list[bool], step: float, ready: int) -> int:
    """As Megatron's loop: a step, then the question whether a signal has come."""
    os.write(ready, b"!")
    end = time.monotonic() + 20
    while not flag and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(step)  # and the save
    return SAVED


def in_a_process(run: Callable[[int], int]) -> tuple[int, int]:
    """Runs a function in a fork; its process, and a pipe on which it says that it is ready."""
    ready, says = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = run(says)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    os.close(says)
    return pid, ready


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def run(monkeypatch):
    """A rank that trains, with a handler of Megatron's for SIGTERM."""
    monkeypatch.setenv("RANK", "0")
    running = []

    def start(
        *,
        begun: bool = True,
        before: Callable[[], object] = lambda: None,
        together: float = 20,
        step: float = 0.2,
    ) -> int:
        monkeypatch.setattr(interrupts, "TOGETHER_SECONDS", together)

        def rank(says: int) -> int:
            before()
            received: list[bool] = []
            signal.signal(signal.SIGTERM, lambda *_: received.append(True))
            signals = ExitSignals(signal.SIGTERM)
            signals.forward()
            if begun:
                signals.before_training(0)
            return training(received, step, says)

        pid, ready = in_a_process(rank)
        running.append(pid)
        assert os.read(ready, 1) == b"!"
        return pid

    yield start
    for pid in running:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name
)
def test_a_signal_lets_the_step_end_and_the_run_save(run, number):
    pid = run()
    os.kill(pid, number)
    assert code_of(pid) == SAVED


def test_ctrl_c_that_comes_from_the_terminal_and_from_torchrun_is_one(run):
    pid = run(together=20)
    for _ in range(3):
        os.kill(pid, signal.SIGINT)
        time.sleep(0.02)
    assert code_of(pid) == SAVED


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_second_ctrl_c_ends_at_once(run, second):
    """torchrun passes the second one on as SIGTERM."""
    pid = run(together=0.1, step=20)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    os.kill(pid, second)
    assert code_of(pid) == 130


def test_before_the_first_step_ctrl_c_ends_the_run(run):
    pid = run(begun=False)
    os.kill(pid, signal.SIGINT)
    assert code_of(pid) == 130


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
def test_what_is_ignored_at_the_start_stays_ignored(run, number):
    """nohup ignores SIGHUP, a shell SIGINT for its background jobs."""
    pid = run(before=lambda: signal.signal(number, signal.SIG_IGN))
    os.kill(pid, number)
    time.sleep(0.1)
    os.kill(pid, signal.SIGUSR1)
    assert code_of(pid) == SAVED


def test_processes_that_read_data_do_not_end_by_the_signals_of_their_rank(run):
    def rank(says: int) -> int:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signals = ExitSignals(signal.SIGTERM)
        signals.forward()
        signals.before_training(0)

        def worker(told: int) -> int:
            os.write(told, b"!")
            time.sleep(0.4)
            return SAVED

        pid, ready = in_a_process(worker)
        os.read(ready, 1)
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.kill(pid, number)
        return code_of(pid)

    pid, _ = in_a_process(rank)
    assert code_of(pid) == SAVED


def test_ctrl_c_before_anything_is_imported_ends_with_one_line():
    code = (
        "from megatron_profit.training.process.interrupts import end_on_interrupt\n"
        "import sys, time\n"
        "assert 'torch' not in sys.modules\n"
        "end_on_interrupt()\n"
        "print('ready', flush=True)\n"
        "time.sleep(20)\n"
    )
    for rank, line in (
        ("0", "megatron-profit-sft: stopped by Ctrl-C before the first step\n"),
        ("1", ""),
    ):
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == line
        assert process.returncode == 130


def test_a_long_wait_can_ask_whether_a_signal_has_come(monkeypatch):
    with DistributedSignalHandler(signal.SIGUSR2) as handler:
        monkeypatch.setattr(exit_signals, "get_signal_handler", lambda: handler)
        assert not exit_signals.signal_has_come()
        signal.raise_signal(signal.SIGUSR2)
        assert exit_signals.signal_has_come()


def test_an_end_of_megatron_without_an_exit_code_is_an_error(capsys):
    """Megatron prints that it cannot load a part of a checkpoint, and calls `sys.exit()`."""
    signals = SimpleNamespace(forward=lambda: None)
    with pytest.raises(SystemExit) as end, main._known_ends(signals):
        sys.exit()
    assert end.value.code == 2
    assert "error: Megatron has ended the run; its last line above" in capsys.readouterr().err


def test_the_entry_can_be_interrupted_before_torch_is_imported():
    """Importing torch takes seconds, in which Ctrl-C would end in a traceback of many lines."""
    code = "import sys, megatron_profit.sft; print({'torch', 'megatron.core'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert result.stdout == "set()\n", result.stderr
