"""The only exception class of this package, and texts that are safe to print."""

from __future__ import annotations

from typing import TextIO

# Characters of a printed text: the most in all, and at the end of one that is cut.
_LONGEST, _TAIL = 2000, 400


class ConversionError(Exception):
    """A folder, a tensor or an option that cannot be converted.

    The message names the file, the tensor and the value, and says how to solve the problem. It is one
    printable line, whatever characters the names in it have. Commands print it and exit with code 2,
    and then no output has been written.

    Args:
        message: The message.
        details: Lines of another program that explain it; printed below it.
    """

    def __init__(self, message: object, details: str = "") -> None:
        super().__init__(printable(message), *([details] if details else []))

    def __str__(self) -> str:
        message, *details = self.args
        lines = (printable(line) for text in details for line in text.splitlines())
        return "\n".join((message, *lines))


def warning(message: object) -> str:
    """Return the line of a warning, in the one form that every part of this project uses."""
    return f"WARNING: {printable(message)}"


def warn(message: object, stream: TextIO | None = None) -> None:
    """Print a warning, by default to stdout; in a run, `console.warn_rank_0` prints one for all processes."""
    print(warning(message), file=stream, flush=True)


def printable(text: object) -> str:
    r"""Escape characters that move the cursor, colour the terminal, end the line or hide others.

    Such a character appears as its escape sequence, for example a newline as `\n` and U+202E as
    `\u202e`. A very long text loses its middle.
    """
    shown = str(text)
    if len(shown) > _LONGEST:
        shown = f"{shown[: _LONGEST - _TAIL]} […] {shown[-_TAIL:]}"
    return escaped(shown)


def escaped(text: object, keep: str = "") -> str:
    """Return a text of any length with its unprintable characters as escapes, except for those in `keep`."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in shown)
