"""The error of a command that cannot be started, and the parser that raises it."""

from __future__ import annotations

import argparse
from typing import NoReturn


class LaunchError(ValueError):
    """The command cannot be started; the message names the value, the limit and the remedy."""


class LaunchParser(argparse.ArgumentParser):
    """A parser that raises `LaunchError` in place of ending the process."""

    def error(self, message: str) -> NoReturn:
        """See argparse."""
        raise LaunchError(message.removeprefix("argument "))
