"""Two kinds of errors in data: `DataError` stops the preparation, `BrokenRecord` leaves one record out."""

import logging
import reprlib

from checkpoint_conversion.errors import escaped

# Bounded in depth and length: a shown value may be a whole record, and may nest without end.
_SHORT = reprlib.Repr(maxlevel=3, maxlist=12, maxdict=8, maxstring=60, maxlong=30)


class DataError(ValueError):
    """The data or the tokenizer cannot be used; the message names the finding and the remedy.

    Each argument is a line. It may quote a file, a record or a template: characters that a terminal would
    obey are shown as escapes.
    """

    def __str__(self) -> str:
        return "\n".join(map(escaped, self.args))


class BrokenRecord(ValueError):
    """One record cannot be used. Preparation catches it, leaves the record out and counts it.

    Attributes:
        reason: A fixed phrase under which such records are counted.
        detail: The finding in this record.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # with these two arguments another process makes it again
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def shown(value: object) -> str:
    """Return `value` as it appears in a message: its repr, with the middle left out if it is long."""
    text = _SHORT.repr(value)
    return text if len(text) <= 300 else f"{text[:300]} ..."


def escape_logs(library: str) -> None:
    """Print each log record of a library as one printable line, as it may quote the content of a file."""
    for handler in logging.getLogger(library).handlers:
        handler.addFilter(_escape)


def _escape(record: logging.LogRecord) -> bool:
    record.msg, record.args = escaped(record.getMessage()), ()
    return True
