"""What a run says before Megatron has set up its process group."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

# By then torchrun has ended this process, where the first one of the machine met the same error.
_PATIENCE_SECONDS = 30


def print_rank_0(message: str) -> None:
    """Print on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def fail(message: object) -> NoReturn:
    """End the run with one message and the exit code 2.

    The first process of each machine says it at once. The others wait, because torchrun ends all
    processes as soon as one has ended, which might be before the first one has said anything.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_PATIENCE_SECONDS)
    print(f"megatron-profit-sft: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
