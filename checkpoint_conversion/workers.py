"""Work in several threads, each with buffers of its own.

Reading, writing and checksums release Python's lock, so threads are enough.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from checkpoint_conversion.errors import ConversionError

_MOST = 8  # more than a disk needs, and what may be taken of a login node


def worker_count(workers: int | None) -> int:
    """The number of threads: as asked for, else one per core and at most 8.

    Raises:
        ConversionError: For less than 1.
    """
    if workers is None:
        return min(_MOST, len(os.sched_getaffinity(0)))
    if workers < 1:
        raise ConversionError(f"--workers is {workers}; it must be at least 1")
    return workers


def run_all[Item, Result](
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> list[Result]:
    """Apply a function to all items; the results, in order.

    After the first error no further item begins, and that error is raised.
    """
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = next((f for f in futures if f in done and f.exception()), None)
            if failed is not None:
                failed.result()
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class Buffers(threading.local):
    """A buffer for each thread, as large as the thread ever asked for."""

    def __init__(self) -> None:
        self._memory = memoryview(bytearray())

    def first(self, nbytes: int) -> memoryview:
        """The first bytes of this thread's buffer."""
        if len(self._memory) < nbytes:
            self._memory = memoryview(bytearray(nbytes))
        return self._memory[:nbytes]
