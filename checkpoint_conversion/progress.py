"""Progress lines of a running conversion."""

from __future__ import annotations

import threading
import time
from typing import TextIO


def human(nbytes: float) -> str:
    """Return a number of bytes with a decimal unit, for example "1.50 GB"."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def duration(seconds: float) -> str:
    """Return a time as text, for example "3 min 20 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class ProgressLine:
    """Counter of tensors and bytes, which writes at most one line per interval. Threads may share it.

    Args:
        tensors: Number of tensors in all.
        nbytes: Number of bytes in all.
        stream: Destination of the lines; None for none.
        interval: Seconds between lines.
    """

    def __init__(
        self, tensors: int, nbytes: int, stream: TextIO | None, interval: float = 2.0
    ) -> None:
        self._total = (tensors, nbytes)
        self._names: set[str] = set()
        self._bytes = 0
        self._stream = stream
        self._interval = interval
        self._start = self._last = time.monotonic()
        self._lock = threading.Lock()

    def add(self, name: str, nbytes: int) -> None:
        """Count bytes of a tensor; a name may come several times."""
        with self._lock:
            self._names.add(name)
            self._bytes += nbytes
            if time.monotonic() - self._last >= self._interval:
                self._write()

    def finish(self) -> None:
        """Write the last line."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        self._last = time.monotonic()
        if self._stream is None:
            return
        tensors, nbytes = self._total
        elapsed = max(self._last - self._start, 1e-3)
        left = (nbytes - self._bytes) * elapsed / max(self._bytes, 1)
        then = f"{duration(left)} left" if self._bytes < nbytes else f"in {duration(elapsed)}"
        print(
            f"{len(self._names)}/{tensors} tensors, {human(self._bytes)} of {human(nbytes)}, "
            f"{human(self._bytes / elapsed)}/s, {then}",
            file=self._stream,
            flush=True,
        )
