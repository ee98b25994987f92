"""The first rank of a run, and the values that all ranks have from it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def is_first_rank() -> bool:
    """Return whether this is the first process of the run, also before there is a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def from_first_rank[T](function: Callable[[], T]) -> T:
    """Call a function on the first rank and return its result on every rank. A collective.

    File systems may show a new file late on other machines, so that they would find something else.
    """
    found: list[Any] = [function() if is_first_rank() else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]
