"""The tie between a rank and the torchrun that started it."""

from __future__ import annotations

import os

from megatron_profit.parent_death import die_with_parent


def die_with_launcher() -> None:
    """End this rank when torchrun is killed.

    Otherwise the ranks would go on and write into the folder of the run that takes their place.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
