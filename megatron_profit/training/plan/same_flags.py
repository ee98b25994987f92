"""The same flags on all nodes: the command of a run is started once on each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_profit.flags import ArgumentsError, flag_of
from megatron_profit.training.process.ranks import is_first_rank, shared_store, world_size

_KEY = "flags"
_PATH = ""


def check_same_flags(given: Mapping[str, Any]) -> None:
    """Refuse ranks that were started with other flags than the first one. All ranks call this.

    They would wait for each other without end, or train different functions. Paths may differ, because a
    folder may have another name on another machine.

    Args:
        given: The flags that were given, by argument.

    Raises:
        ArgumentsError: Names the flag and both values.
    """
    if world_size() == 1:
        return
    own = {name: _PATH if _is_path(value) else repr(value) for name, value in given.items()}
    if is_first_rank():
        shared_store().set(_KEY, json.dumps(own))
        return
    first = json.loads(shared_store().get(_KEY))  # waits for the first rank
    for name in sorted(own.keys() | first.keys()):
        here, there = own.get(name, "not given"), first.get(name, "not given")
        if here != there and _PATH not in (here, there):
            raise ArgumentsError(
                f"{flag_of(name)} is {here} on this node and {there} on the first one; start the same "
                "command on all nodes"
            )


def _is_path(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(item, str) and "/" in item for item in values)
