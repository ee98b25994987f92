"""Console and curves that never end a run.

Training goes on when a disk is full, a pipe is closed or a folder is gone. The first failure is reported.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from checkpoint_conversion.errors import warn, warning

_STREAMS = {1: "stdout", 2: "stderr"}


class Guard:
    """Calls functions until one fails. It reports the failure, and calls none after that.

    Args:
        what: Name of the output, for the message.
    """

    def __init__(self, what: str) -> None:
        self._what, self._failed = what, False

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function in a form that returns None if it fails or is not called any more."""

        @functools.wraps(function, updated=())
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self._failed:
                return None
            try:
                return function(*args, **kwargs)
            except Exception as error:  # whatever a logger raises, training is worth more
                self._failed = True
                warn(
                    f"{self._what} cannot be written ({reason(error)}); the run goes on without it"
                )
                return None

        return guarded


class Enduring:
    """An object, or a module, whose functions go through a guard."""

    def __init__(self, target: Any, guard: Guard) -> None:
        self._target, self._guard = target, guard

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        return self._guard(found) if callable(found) else found


def reason(error: BaseException) -> str:
    """Describe an error in a few words, by the operating system's error at its root if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            where = f": {cause.filename}" if cause.filename else ""
            return f"OSError {cause.errno}, {os.strerror(cause.errno)}{where}"
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")


def endure_console() -> None:
    """Let this process and its children go on when nobody reads their output any more or a disk is full.

    A descriptor that was closed before the start becomes the null device. Otherwise the next file that is
    opened would take its number and receive all printed text.
    """
    for descriptor in (0, *_STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for descriptor, name in _STREAMS.items():
        stream = getattr(sys, name)
        encoding = None if stream is None else stream.encoding
        setattr(sys, name, _text(_Descriptor(descriptor), encoding))


def _text(raw: io.RawIOBase, encoding: str | None) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=True)


class _Descriptor(io.RawIOBase):
    """A file descriptor to which every write succeeds; text that cannot be written is lost."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._failed = descriptor, False

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: Any) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            self._lose(error)
            return len(data)

    def _lose(self, error: OSError) -> None:
        """Report the first failure on the other stream, and never write to a closed pipe again."""
        if not self._failed:
            self._failed = True
            name = _STREAMS[self._descriptor]
            lost = f"{name} cannot be written ({reason(error)}); the run goes on without it"
            with contextlib.suppress(OSError):
                os.write(sum(_STREAMS) - self._descriptor, f"{warning(lost)}\n".encode())
        if error.errno == errno.EPIPE:
            # Also serves libraries that write without Python.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._descriptor)
            os.close(null)
