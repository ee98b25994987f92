"""Work in several threads, each with its own buffers.

Reading, writing and checksums release Python's lock, so threads are enough.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from checkpoint_conversion.errors import ConversionError

_MOST = 8  # more than a disk needs, and acceptable on a login node
_MOST_ASKED_FOR = 256
# Measured: the interpreter with the modules of a conversion, and numpy.
_BASE_BYTES, _NUMPY_BYTES = 20 << 20, 12 << 20


def worker_count(workers: int | None) -> int:
    """Return the number of threads: as asked for, otherwise one per core and at most 8.

    Raises:
        ConversionError: For less than 1, or more than any machine needs.
    """
    if workers is None:
        return min(_MOST, len(os.sched_getaffinity(0)))
    if not 1 <= workers <= _MOST_ASKED_FOR:
        raise ConversionError(f"--workers is {workers}; it must be from 1 to {_MOST_ASKED_FOR}")
    return workers


def run_all[Item](
    function: Callable[[Item], Iterable[object] | None], items: Iterable[Item], workers: int
) -> None:
    """Apply a function to all items, which are drawn one at a time.

    After the first error no further item begins, and that error is raised.

    Args:
        function: The work for one item. A generator for work that takes long: after an error in another
            thread, it stops at its next `yield`.
        items: The items; an endless iterator is allowed.
        workers: Number of threads.
    """
    source, lock, stopped = iter(items), threading.Lock(), threading.Event()

    def work() -> None:
        try:
            while not stopped.is_set():
                with lock:
                    item = next(source)
                for _ in function(item) or ():
                    if stopped.is_set():
                        return
        except StopIteration:
            pass
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in [pool.submit(work) for _ in range(workers)]:
                future.result()
        finally:
            stopped.set()


def peak_memory(workers: int, largest: int, converts: bool) -> int:
    """Estimate the largest resident memory of a conversion, in bytes.

    Args:
        workers: Number of threads.
        largest: Bytes of the largest part that is moved at a time.
        converts: Whether the dtype changes, which takes intermediate values.
    """
    if converts:
        return _BASE_BYTES + _NUMPY_BYTES + 12 * workers * largest
    return _BASE_BYTES + workers * largest


class Buffers(threading.local):
    """A buffer for each thread, as large as the thread ever asked for."""

    def __init__(self) -> None:
        self._memory = memoryview(bytearray())

    def first(self, nbytes: int) -> memoryview:
        """Return the first bytes of this thread's buffer."""
        if len(self._memory) < nbytes:
            self._memory = memoryview(bytearray(nbytes))
        return self._memory[:nbytes]
