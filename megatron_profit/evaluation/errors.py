"""The error class of evaluation, and the check for packages that an installation may lack."""

from __future__ import annotations

import importlib.util

from checkpoint_conversion.errors import printable

# Packages that come with this one, unless it was installed without what it needs.
GRADERS = "'lm-eval[ifeval]' math-verify"


class EvaluationError(ValueError):
    """An evaluation cannot go on; the message is one printable line that says what to do."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


def require(*packages: str, for_what: str, install: str = GRADERS) -> None:
    """Check that packages are installed.

    Raises:
        EvaluationError: One is missing; the message says how to install it.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise EvaluationError(f"{for_what} needs {', '.join(missing)}; run pip install {install}")
