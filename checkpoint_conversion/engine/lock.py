"""The one kind of lock: the kernel holds it for a process on a file, and releases it when the process ends.

It is a POSIX record lock (`lockf`), which machines that share an NFS respect too. The server releases it when
the process ends or its machine starts again; the lock of a machine that never comes back stays until the file
is removed. Some file systems have no locks, and some keep them to one machine (NFS with `nolock`, Lustre with
`localflock`). So a lock may save work or find a mistake, but data must not depend on it.

A child process does not inherit the lock. Within a process, closing any descriptor of the file releases it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpoint_conversion.engine.regular_files import open_to_append

_POLL_SECONDS = 0.2
# Errors of file systems that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# Another thread of this process would get the lock too, and release it for both.
_threads: dict[Path, threading.Lock] = {}


class NoLocksError(Exception):
    """The file system has no locks."""


def take_lock(
    descriptor: int, patience: float = math.inf, waiting: Callable[[], object] | None = None
) -> bool:
    """Lock an opened file, which must be writable.

    Args:
        descriptor: Of the file.
        patience: Seconds to wait for a process that has the lock.
        waiting: Called once when the lock is not free.

    Returns:
        Whether this process has the lock now.

    Raises:
        NoLocksError: See there.
        OSError: The file cannot be locked.
    """
    end = time.monotonic() + patience
    while not _taken(descriptor):
        if time.monotonic() >= end:
            return False
        if waiting:
            waiting()
        waiting = None
        time.sleep(_POLL_SECONDS)
    return True


def _taken(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocksError from error
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def is_in_place(path: Path, descriptor: int) -> bool:
    """Return whether an opened file or folder is still under its name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def lock_file(
    path: Path, patience: float = math.inf, waiting: Callable[[], object] | None = None
) -> Iterator[bool]:
    """Hold a lock on a file that exists only while a process holds it or waits for it.

    Yields:
        Whether the kernel holds the lock: False on a file system without locks.

    Raises:
        BlockingIOError: Another process, or another thread of this one, still holds it.
        ConversionError: The file is a link, or not a regular file.
        OSError: It cannot be made or locked.
    """
    path = path.absolute()
    thread = _threads.setdefault(path, threading.Lock())
    if not thread.acquire(timeout=-1 if patience == math.inf else patience):
        raise BlockingIOError(errno.EAGAIN, "another thread holds the lock", str(path))
    try:
        descriptor, locked = _opened_and_locked(path, patience, waiting)
        try:
            yield locked
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        thread.release()


def _opened_and_locked(
    path: Path, patience: float, waiting: Callable[[], object] | None
) -> tuple[int, bool]:
    """Return the descriptor of a lock file, and whether the kernel holds the lock."""
    while True:
        descriptor = open_to_append(path)
        try:
            if not take_lock(descriptor, patience, waiting):
                raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path))
            # The last holder may have removed the file while this process waited.
            if is_in_place(path, descriptor):
                return descriptor, True
        except NoLocksError:
            return descriptor, False
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
