"""The first rank of a run, and the values that all ranks have from it.

The entry needs the first rank before it imports anything that takes long, so torch is imported only where a
collective needs it.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

# The other ranks wait in a collective, which must not take longer than its time limit.
_LOOK_EVERY_SECONDS = 20
# Time that a network file system may take to show a machine what another one has written.
PATIENCE_SECONDS = 90

if TYPE_CHECKING:
    from concurrent.futures import Future

    from torch.distributed import Store


def is_first_rank() -> bool:
    """Return whether this is the first process of the run, also before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Return the number of processes of the run, also before there is a process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@functools.cache
def shared_store() -> Store:
    """Return the store of all ranks, which they have before there is a process group.

    Megatron's process group will use it too. Where a rank hosts it, it ends with its last user.
    """
    from torch.distributed import PrefixStore, rendezvous

    return PrefixStore("megatron_profit", next(rendezvous("env://"))[0])


def from_first_rank[T](function: Callable[[], T]) -> T:
    """Call a function on the first rank and return its result on every rank. A collective.

    File systems may show a new file late on other machines, so that they would find something else.
    """
    import torch.distributed as dist

    found: list[Any] = [function() if is_first_rank() else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def from_first_rank_in_time[T](function: Callable[[], T]) -> T:
    """Return what `from_first_rank` does, of a function that may take longer than a collective may.

    The first rank tells the others every few seconds that it goes on. For example, NCCL ends a run after 10
    minutes in a collective, and the files of a large model take longer to read.
    """
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(function) if is_first_rank() else None
        while from_first_rank(lambda: _goes_on(running)):
            pass
        return from_first_rank(lambda: _result_of(running))


def is_seen_in_time(condition: Callable[[], bool], patience: float = PATIENCE_SECONDS) -> bool:
    """Return whether this machine sees in time what another one has written.

    Args:
        condition: Looks at the file system.
        patience: Seconds to wait.
    """
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _goes_on(running: Future[Any] | None) -> bool:
    """Wait a while for the end of a function, and return whether it still runs."""
    from concurrent.futures import wait

    assert running is not None
    return not wait([running], _LOOK_EVERY_SECONDS).done


def _result_of[T](running: Future[T] | None) -> T:
    assert running is not None
    return running.result()
