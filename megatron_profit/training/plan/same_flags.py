"""The same flags and device on all nodes: the command of a run is started once on each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_profit.flags import ArgumentsError, flag_of
from megatron_profit.training.process.ranks import is_first_rank, shared_store, world_size

_KEY = "flags"
_PATH = ""
_DEVICE = "device in use"  # no flag: --device may be "auto"


def check_same_flags(given: Mapping[str, Any], device: str) -> None:
    """Refuse ranks that were started with other flags than the first one, or found another device. All ranks
    call this.

    They would wait for each other without end, or train different functions. Paths may differ, because a
    folder may have another name on another machine.

    Args:
        given: The flags that were given, by argument.
        device: The device of this rank: `--device auto` looks at the machine.

    Raises:
        ArgumentsError: Names the flag and both values.
    """
    if world_size() == 1:
        return
    own = {name: _PATH if _is_path(value) else repr(value) for name, value in given.items()}
    own[_DEVICE] = device
    if is_first_rank():
        shared_store().set(_KEY, json.dumps(own))
        return
    first = json.loads(shared_store().get(_KEY))  # waits for the first rank
    for name in sorted((own.keys() | first.keys()) - {_DEVICE}):
        here, there = own.get(name, "not given"), first.get(name, "not given")
        if here != there and _PATH not in (here, there):
            raise ArgumentsError(
                f"{flag_of(name)} is {here} on this node and {there} on the first one; start the same "
                "command on all nodes"
            )
    if device != first[_DEVICE]:
        raise ArgumentsError(
            f"the device is {device} on this node and {first[_DEVICE]} on the first one, because torch "
            "sees GPUs on one of the two alone; mend the other one, or give --device cpu on all nodes"
        )


def _is_path(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(item, str) and "/" in item for item in values)
