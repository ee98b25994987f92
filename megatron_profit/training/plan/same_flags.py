"""The same flags, device and data on all nodes: the command of a run is started once on each of them."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import Any

from megatron_profit.data.errors import DataError
from megatron_profit.flags import ArgumentsError, flag_of
from megatron_profit.training.process.ranks import is_first_rank, shared_store, world_size

_KEY, _DATA = "flags", "data"
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


def check_same_data(sets: Mapping[str, tuple[str, int]]) -> None:
    """Refuse ranks whose files hold other data than the first one's. All ranks call this.

    Each rank reads its rows itself. Two nodes with two states of a file, or with tokenizers that differ,
    would train inputs of one with the labels of the other.

    Args:
        sets: A hash of the tokenised examples of each data set, and their number, by its flag.

    Raises:
        DataError: Names the flag and both numbers of examples.
    """
    if world_size() == 1:
        return
    if is_first_rank():
        shared_store().set(_DATA, json.dumps(sets))
        return
    first = json.loads(shared_store().get(_DATA))
    for flag, (digest, examples) in sets.items():
        there = first.get(flag, ["", 0])
        if digest != there[0]:
            raise DataError(
                f"{flag} has other tokens on this node ({platform.node()}, {examples:,} examples) than on "
                f"the first one ({there[1]:,} examples); give all nodes the same files, tokenizer and "
                "versions of transformers and tokenizers"
            )


def _is_path(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(item, str) and "/" in item for item in values)
