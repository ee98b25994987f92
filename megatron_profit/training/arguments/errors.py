"""The error of flags that cannot be used."""

from __future__ import annotations


class ArgumentsError(ValueError):
    """The flags cannot be used; the message names the value, the limit and the remedy."""
