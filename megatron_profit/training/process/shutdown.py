"""The end of a run's communication."""

from __future__ import annotations

import time

import torch

# Seconds that other threads may take for what is left to them; they need less than one of Python's turns.
_LAST_TURN = 0.1


def end_communication() -> None:
    """Destroy all process groups, such that the interpreter can be left at once.

    torch and Megatron keep references to groups, with which Gloo's threads outlive the groups' destruction.
    If one of them is still about to free a Python object of its last collective when the interpreter ends,
    it takes the process with it: "terminate called without an active exception", signal 6.
    """
    try:
        torch.distributed.destroy_process_group()
    finally:
        time.sleep(_LAST_TURN)
