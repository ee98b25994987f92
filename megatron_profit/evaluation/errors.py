"""The error class of evaluation, and the check for optional packages."""

from __future__ import annotations

import importlib.util

from checkpoint_conversion.errors import printable

EXTRA = "megatron-profit[eval]"


class EvaluationError(ValueError):
    """An evaluation cannot go on; the message is one printable line that says what to do."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


def require(*packages: str, for_what: str, install: str = EXTRA) -> None:
    """Check that optional packages are installed.

    Raises:
        EvaluationError: One is missing; the message says how to install it.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise EvaluationError(f"{for_what} needs {', '.join(missing)}; run pip install '{install}'")
