"""A quiet console: this project's lines are shown, and all that Megatron prints goes to a log file.

Megatron prints about a thousand lines before the first step. With `--quiet` its lines, and the warnings and
messages of other packages, are in `megatron.log` next to the metrics file. Errors are shown in any case.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from checkpoint_conversion.engine.output import whole_file
from checkpoint_conversion.engine.regular_files import open_to_append
from checkpoint_conversion.errors import ConversionError, warn
from megatron_profit.megatron_patches.enduring import Enduring, Guard
from megatron_profit.training.process.ranks import is_first_rank

LOG, ARGUMENTS = "megatron.log", "arguments.txt"
_OWN, _BETWEEN = ("megatron_profit", "checkpoint_conversion", "__main__"), "wandb"
# Characters that are kept before there is a file.
_KEPT = 1_000_000
_CLEAR_LINE = "\033[K"


class Quiet(io.TextIOBase):
    """The standard output of a quiet process: the module that prints decides where its text goes.

    Args:
        console: The stream that people see.
    """

    def __init__(self, console: TextIO) -> None:
        self._console = console
        self._log: io.StringIO | Enduring = io.StringIO()
        self._live = False

    def write(self, text: str) -> int:
        """Show a text of this project's modules; log all others'."""
        if _printing_package() not in _OWN:
            return self.log(text)
        if self._live:
            self._console.write("\n")
            self._live = False
        return self._console.write(text)

    def log(self, text: str) -> int:
        """Write a text to the log."""
        if not isinstance(self._log, io.StringIO) or self._log.tell() < _KEPT:
            self._log.write(text)
        return len(text)

    def show_live(self, line: str) -> None:
        """Show a line in the place of the one before on a terminal that can do this, else below it."""
        if not self.isatty() or os.environ.get("TERM") == "dumb":
            self._console.write(f"{line}\n")
        else:  # a longer line would take two lines, of which only the second is replaced
            width = shutil.get_terminal_size().columns - 1
            self._console.write(f"\r{line[:width]}{_CLEAR_LINE}")
            self._live = True
        self._console.flush()

    def keep_log(self, file: Path) -> None:
        """Write what was logged to the end of a file, and what will be."""
        early = self._log
        log = os.fdopen(
            open_to_append(file), "a", encoding="utf-8", errors="backslashreplace", buffering=1
        )
        self._log = Enduring(log, Guard(str(file)))
        if isinstance(early, io.StringIO):
            self._log.write(early.getvalue())

    def end(self) -> None:
        """End a live line."""
        if self._live:
            self._console.write("\n")
            self._console.flush()
            self._live = False

    def flush(self) -> None:
        """See io."""
        self._console.flush()

    def isatty(self) -> bool:
        """See io."""
        return self._console.isatty()

    def fileno(self) -> int:
        """See io."""
        return self._console.fileno()


def _printing_package() -> str:
    """Return the package whose module has called `print`. W&B puts a function of its own in between."""
    frame: FrameType | None = sys._getframe(2)
    package = _BETWEEN
    while frame is not None and package == _BETWEEN:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        frame = frame.f_back
    return package


class _Logged(io.TextIOBase):
    """Where other packages' log messages go."""

    def __init__(self, quiet: Quiet) -> None:
        self._quiet = quiet

    def write(self, text: str) -> int:
        return self._quiet.log(text)


_quiet: Quiet | None = None


def begin_quiet() -> None:
    """Make this process quiet. It comes before Megatron's import, which warns."""
    global _quiet
    _quiet = quiet = Quiet(sys.stdout)
    sys.stdout = quiet  # type: ignore[assignment]
    errors = logging.StreamHandler(sys.stderr)
    errors.setLevel(logging.ERROR)
    logging.basicConfig(handlers=[logging.StreamHandler(_Logged(quiet)), errors])

    def to_log(message: Any, category: Any, filename: str, line: int, *_: Any, **__: Any) -> None:
        quiet.log(warnings.formatwarning(message, category, filename, line))

    warnings.showwarning = to_log  # type: ignore[assignment]
    atexit.register(quiet.end)


def quiet_console() -> Quiet | None:
    """Return the console of a quiet process; None in another one."""
    return _quiet


def keep_files(folder: Path | None, arguments: Mapping[str, Any]) -> None:
    """Write the arguments and the log of a quiet run next to its metrics, on the first rank.

    Args:
        folder: The folder of the metrics; None if the run has none.
        arguments: All arguments by name.
    """
    if _quiet is None or folder is None or not is_first_rank():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = (f"{name} = {arguments[name]!r}\n" for name in sorted(arguments))
        with whole_file(folder / ARGUMENTS) as stream:
            stream.write("".join(lines).encode(errors="backslashreplace"))
        _quiet.keep_log(folder / LOG)
    except (ConversionError, OSError) as error:
        warn(f"{LOG} and {ARGUMENTS} are not written ({error}); the run goes on without them")
