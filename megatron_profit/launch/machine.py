"""The machine that a run starts on: its GPUs, cores and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_profit.estimates.memory import GIB
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.training.arguments.platform import has_driver

# A process of its own, because asking makes a context on the GPU, which would stay for the whole run.
_ASK = """
import json, torch
count = torch.cuda.device_count()
found = [torch.cuda.get_device_properties(number) for number in range(count)]
print(json.dumps([[p.name, p.total_memory] for p in found]))
"""

_ASK_SECONDS = 300
# Files of a control group, of both versions: its limit, its use, and where the part of the use stands that is
# unused cache of files.
_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        *("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
        "total_inactive_file",
    ),
)


@dataclass(frozen=True)
class Machine:
    """A machine.

    Attributes:
        gpus: GiB of each GPU.
        gpu_name: Name of the first GPU, "" without one.
        cores: Cores that this process may use.
        memory: GiB of memory that is available.
    """

    gpus: tuple[float, ...]
    gpu_name: str
    cores: int
    memory: float

    def __str__(self) -> str:
        if self.gpus:
            return f"{len(self.gpus)} x {self.gpu_name} of {min(self.gpus):.4g} GiB"
        return f"no GPU, {self.cores} CPU cores, {self.memory:.0f} GiB of memory available"


def this_machine(look_for_gpus: bool = True) -> Machine:
    """Return what is here.

    Raises:
        LaunchError: There is a driver, but torch cannot ask it, or it does not answer.
    """
    gpus = _gpus() if look_for_gpus else []
    return Machine(
        gpus=tuple(memory / GIB for _, memory in gpus),
        gpu_name=gpus[0][0] if gpus else "",
        cores=len(os.sched_getaffinity(0)),
        memory=available_memory() / GIB,
    )


def _gpus() -> list[tuple[str, int]]:
    """Return name and bytes of each visible GPU."""
    if not has_driver():
        return []
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _ASK],
            capture_output=True,
            text=True,
            check=False,
            timeout=_ASK_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"the GPU's driver has not answered torch in {_ASK_SECONDS} seconds; `nvidia-smi` tells whether "
            "it hangs, and --device cpu trains without a GPU"
        ) from error
    if answer.returncode:
        last = answer.stderr.strip().rpartition("\n")[2]
        raise LaunchError(
            f"torch cannot ask the GPU's driver ({last}); `megatron-profit doctor` says more, and --device "
            "cpu trains without a GPU"
        )
    last = answer.stdout.strip().rpartition("\n")[2]  # other lines may come from torch
    return [(name, memory) for name, memory in json.loads(last)]


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that new processes may use: the system's, or less in a container.

    Args:
        root: Folder of the files of the system, for tests.
    """
    system = _pairs(root / "proc" / "meminfo").get("MemAvailable:", 0) * 1024
    groups = root / "sys" / "fs" / "cgroup"
    rooms = [_room_in_group(groups, names) for names in _GROUPS]
    return max(min([system, *(room for room in rooms if room is not None)]), 0)


def _room_in_group(groups: Path, names: tuple[str, str, str, str]) -> int | None:
    """Return the bytes that this process's control group has left; None where it has no limit."""
    limit, used, statistics, cache = names
    try:
        most = int((groups / limit).read_text())
        # Pages of files that nobody uses go as soon as a process needs the memory.
        return most - int((groups / used).read_text()) + _pairs(groups / statistics)[cache]
    except (OSError, ValueError, KeyError):  # no such group, or "max"
        return None


def _pairs(file: Path) -> dict[str, int]:
    """Return the numbers of a file with a name and a number on each line."""
    lines = map(str.split, file.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}
