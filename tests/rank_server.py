"""Starts the ranks of a run as forks of one process that has imported Megatron already.

Importing Megatron takes about six seconds of a core, several times what a test's few training steps take.
The ranks are real processes with the environment that torchrun gives them; only their start is shared.
Requests and answers are lines of JSON on standard input and output.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

# Each worker of pytest-xdist has ports of its own.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.cycle(range(10_000 + 500 * _WORKER, 10_500 + 500 * _WORKER))
# Between the failure of one rank and the end of the others by force, in seconds.
GRACE = 5.0


def main() -> None:
    """Import what every run needs, then serve one request after the other until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from megatron_profit.megatron_patches import activate

    activate("cpu")
    import sentencepiece  # noqa: F401
    import tiktoken  # noqa: F401
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    import megatron_profit.training.main  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run(**request)), file=answers, flush=True)


def run(
    command: list[str], world_size: int, cwd: str, env: dict[str, str], output: str, timeout: float
) -> dict[str, Any]:
    """Run one command on `world_size` ranks.

    Args:
        command: `-m MODULE ARGUMENT…` or `SCRIPT ARGUMENT…`, as after `python`.
        world_size: Ranks, all on this machine.
        cwd: Their working directory.
        env: Their whole environment, to which each rank's own variables are added.
        output: File that gets what they print.
        timeout: Seconds after which they are killed.

    Returns:
        `returncode`, 0 or that of the first rank that failed, and `timed_out`.
    """
    port = _free_port()
    ranks = set()
    for rank in range(world_size):
        own = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        pid = os.fork()
        if pid == 0:
            _become(command, cwd, {**env, **{k: str(v) for k, v in own.items()}}, output)
        ranks.add(pid)
    return _wait(ranks, time.monotonic() + timeout)


def _free_port() -> int:
    """Return a port below the ephemeral ones: no outgoing connection takes it before rank 0 listens."""
    while True:
        port = next(_PORTS)
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port


def _become(command: list[str], cwd: str, env: dict[str, str], output: str) -> None:
    """Turn this fork into a fresh `python COMMAND`; does not return."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    code = 1
    try:
        _execute(command, cwd)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        # What the interpreter does at its end, which os._exit leaves out.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _execute(command: list[str], cwd: str) -> None:
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path[0] = cwd
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path[0] = str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")


def _wait(running: set[int], deadline: float) -> dict[str, Any]:
    returncode, timed_out, terminated = 0, False, False
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                returncode = returncode or os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        timed_out = timed_out or (now > deadline and not terminated)
        if (returncode or timed_out) and not terminated:
            terminated, deadline = True, now + GRACE
            _signal(running, signal.SIGTERM)
        elif terminated and now > deadline:
            _signal(running, signal.SIGKILL)
        time.sleep(0.02)
    return {"returncode": returncode, "timed_out": timed_out}


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


if __name__ == "__main__":
    main()
