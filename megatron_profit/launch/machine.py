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
        LaunchError: There is a driver, but torch cannot ask it.
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
    answer = subprocess.run(
        [sys.executable, "-c", _ASK], capture_output=True, text=True, check=False, timeout=300
    )
    if answer.returncode:
        last = answer.stderr.strip().rpartition("\n")[2]
        raise LaunchError(
            f"torch cannot ask the GPU's driver ({last}); `megatron-profit doctor` says more, and --device "
            "cpu trains without a GPU"
        )
    last = answer.stdout.strip().rpartition("\n")[2]  # other lines may come from torch
    return [(name, memory) for name, memory in json.loads(last)]


def available_memory() -> int:
    """Return the bytes of memory that new processes may use: the system's, or less in a container."""
    system = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            system = int(line.split()[1]) * 1024
    limits = [system]
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            limits.append(int(limit) - used)
    except (OSError, ValueError):
        pass
    return max(min(limits), 0)
