"""The end of a run's communication."""

from __future__ import annotations

import time

import torch

# Seconds that other threads get to finish; they need less than one of Python's thread switches.
_LAST_TURN = 0.1


def end_communication() -> None:
    """Destroy all process groups, so that the interpreter can exit at once.

    torch and Megatron keep references to groups, so Gloo's threads outlive the groups' destruction. Suppose
    that one of them is about to free a Python object of its last collective when the interpreter exits. It
    then ends the process with "terminate called without an active exception", signal 6.
    """
    try:
        torch.distributed.destroy_process_group()
    finally:
        time.sleep(_LAST_TURN)
