"""The tie between a rank and the torchrun that started it."""

from __future__ import annotations

import os

from megatron_profit.parent_death import die_with_parent

# The id of torchrun's that says of no two starts whether they are of one job.
_NO_ID = "none"


def job_id() -> str | None:
    """Return the id that all starts of this rank by torchrun share (`--rdzv-id`); None without one.

    The number of restarts is each node's own: one that starts again because another node has come back does
    not count it.
    """
    found = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if found in ("", _NO_ID) else found


def die_with_launcher() -> None:
    """End this rank when torchrun is killed.

    Otherwise the ranks would go on and write into the folder of the run that takes their place.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
