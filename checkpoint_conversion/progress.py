"""What a conversion tells while it runs."""

from __future__ import annotations

import time
from typing import TextIO


def human(nbytes: float) -> str:
    """A number of bytes with a decimal unit, such as "1.50 GB"."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


class Progress:
    """Counts tensors and bytes; writes at most one line per interval.

    Args:
        tensors: Number of tensors in all.
        nbytes: Number of bytes in all.
        stream: Where lines go; None for nowhere.
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

    def add(self, name: str, nbytes: int) -> None:
        """Count bytes of a tensor; a name may come several times."""
        self._names.add(name)
        self._bytes += nbytes
        if time.monotonic() - self._last >= self._interval:
            self._write()

    def finish(self) -> None:
        """Write the last line."""
        self._write()

    def _write(self) -> None:
        self._last = time.monotonic()
        if self._stream is None:
            return
        tensors, nbytes = self._total
        rate = self._bytes / max(self._last - self._start, 1e-3)
        print(
            f"{len(self._names)}/{tensors} tensors, {human(self._bytes)} of {human(nbytes)}, "
            f"{human(rate)}/s",
            file=self._stream,
            flush=True,
        )
