"""Ctrl-C outside of the training: the process ends with one line, not with a traceback.

It imports only small modules, because it is needed before all others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType
from typing import NoReturn

from megatron_profit.training.process.ranks import is_first_rank

# The terminal sends SIGINT to all processes, and torchrun passes its own on: such a pair is one Ctrl-C.
TOGETHER_SECONDS = 2.0
# The exit code of a shell: 128 plus the number of the signal.
EXIT_CODE = 128 + signal.SIGINT


def end_on_interrupt() -> None:
    """Let Ctrl-C end this process, unless the process that started it wants it to ignore Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    end("stopped by Ctrl-C before the first step")


def end(message: str) -> NoReturn:
    """End this process in a signal handler; the first rank prints why."""
    say(f"megatron-profit-sft: {message}")
    begun = time.monotonic()

    def again(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - begun > TOGETHER_SECONDS:
            os._exit(EXIT_CODE)

    signal.signal(signal.SIGINT, again)
    raise SystemExit(EXIT_CODE)


def say(line: str) -> None:
    """Print a line on the first rank, in a signal handler: `print` may be running below it."""
    if is_first_rank():
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())
