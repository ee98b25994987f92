"""What ties a rank to the torchrun that has started it."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_launcher() -> None:
    """Let the kernel kill this rank when torchrun is killed, which otherwise leaves its ranks running: they
    would write into the folder of the run that takes their place. Linux only."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
