"""The error of a command that cannot be started."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LaunchError(ValueError):
    """The command cannot be started; the message names the value, the limit and the remedy."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` with the known name that is spelt most alike, "" if none is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.65)
    return f"; did you mean {found[0]}?" if found else ""
