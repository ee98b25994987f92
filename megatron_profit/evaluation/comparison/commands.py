"""Runs the commands of a comparison, with a log and the time of each, and a stop that ends them first."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Queue
from types import FrameType

from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.parent_death import die_with_parent

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TAIL_LINES = 15
_STOPPED = "stopped; the same command goes on from here"


class _Children:
    """The processes that run now, and whether they have been told to end."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Tell all processes to end, as a signal handler."""
        self.stopping = True
        for process in list(self.running):
            process.terminate()


_children = _Children()


class _Worker(threading.local):
    """Of one thread that runs commands: the GPUs that they see; None for all."""

    gpus: str | None = None


_worker = _Worker()


def take_gpus(shares: Queue[str | None]) -> None:
    """Take a share of the GPUs for the commands of this thread, as the initializer of a pool.

    Args:
        shares: A value of CUDA_VISIBLE_DEVICES for each thread; None hides no GPU.
    """
    _worker.gpus = shares.get_nowait()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP end the commands inside the block.

    A command gets SIGTERM, at which a training saves. Then `execute` raises. An ignored signal stays ignored,
    as under nohup. Outside of the main thread the block changes no handler, because Python does not allow it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _children.stop)
        yield
    finally:
        _children.stopping = False
        for number, handler in before.items():
            signal.signal(number, handler)


def execute(command: Sequence[str], log: Path, threads: int) -> None:
    """Run a command, whose output goes to a file; it ends with this process, however that ends.

    Args:
        command: The words of the command.
        log: The file.
        threads: Threads of a process, where OMP_NUM_THREADS does not say.

    Raises:
        EvaluationError: The command failed or was stopped.
    """
    if _children.stopping:
        raise EvaluationError(_STOPPED)
    begun = time.monotonic()
    env = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if _worker.gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = _worker.gpus
    with log.open("w", encoding="utf-8") as file:
        # A session of its own: a terminal's Ctrl-C comes to this process alone, which ends the command.
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        _children.running.add(process)
        if _children.stopping:  # the signal came in between
            process.terminate()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        _children.running.discard(process)
    with log.with_suffix(".times").open("a", encoding="utf-8") as file:
        file.write(json.dumps([usage.ru_utime + usage.ru_stime, time.monotonic() - begun]) + "\n")
    if _children.stopping:
        raise EvaluationError(_STOPPED)
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = " / ".join([line for line in lines if "error: " in line] or lines[-_TAIL_LINES:])
        raise EvaluationError(f"{shlex.join(command)} failed ({log}): {tail}")


def seconds_of(log: Path) -> list[float]:
    """Return the CPU seconds and the seconds that all tries of a command took, interrupted ones included."""
    file = log.with_suffix(".times")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    times = [json.loads(line) for line in lines]
    return [round(sum(column), 2) for column in zip(*times, strict=True)] or [0.0, 0.0]
