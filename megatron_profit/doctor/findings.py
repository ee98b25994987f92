"""Findings of the doctor, and how they are shown."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from checkpoint_conversion.errors import ConversionError, printable

_WIDTH = 12


class Verdict(enum.Enum):
    """How a finding is meant."""

    OK = "ok"
    NOTE = "note"
    WARNING = "WARNING"
    FAULT = "FAULT"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        verdict: Whether something has to be done.
        subject: What was looked at, in one or two words.
        text: What was found, and the remedy.
    """

    verdict: Verdict
    subject: str
    text: str

    def __str__(self) -> str:
        first, *more = self.text.split("\n")
        lines = [f"{self.verdict.value:<7} {self.subject:<{_WIDTH}} {printable(first)}"]
        return "\n".join([*lines, *(f"{'':{_WIDTH + 8}} {printable(line)}" for line in more)])


def ok(subject: str, text: str) -> Finding:
    """Return a finding that is as it should be."""
    return Finding(Verdict.OK, subject, text)


def note(subject: str, text: str) -> Finding:
    """Return a finding that is worth knowing."""
    return Finding(Verdict.NOTE, subject, text)


def warning(subject: str, text: str) -> Finding:
    """Return a finding that may do harm."""
    return Finding(Verdict.WARNING, subject, text)


def fault(subject: str, text: str) -> Finding:
    """Return a finding with which a run fails or trains nonsense."""
    return Finding(Verdict.FAULT, subject, text)


def examined(subject: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check; an error that it raises is a fault.

    A check must not end the others, so errors of any kind are caught: the doctor runs what may be broken.
    """
    try:
        yield from check()
    except (ConversionError, ValueError, OSError) as error:
        yield fault(subject, str(error))
    except Exception as error:  # of torch, its libraries, transformers
        reason = str(error).strip().partition("\n")[0]
        yield fault(subject, f"{type(error).__name__}: {reason}")
