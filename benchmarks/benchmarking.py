"""Shared parts of the benchmarks: measuring in turn, memory in real use, results as dated files.

Time and memory are measured together, in rounds. Every computation runs once before any runs again, so
a machine that gets slower or faster affects all of them alike. Medians are reported.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_profit.evaluation.engines.engine import computes_in_bfloat16

RESULTS = Path(__file__).resolve().parent / "results"
MIB = 1 << 20


@contextmanager
def group_of_one(device: str, rendezvous: str) -> Iterator[None]:
    """Let this process be a process group of its own inside the `with` block.

    Args:
        device: "cuda" or "cpu".
        rendezvous: Path of a file that does not exist yet.
    """
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=0,
        world_size=1,
    )
    yield
    dist.destroy_process_group()


@dataclass(frozen=True)
class Measurement:
    """Runs of one computation.

    Attributes:
        seconds: Of each run; under tensor parallelism the slowest rank's.
        peak_bytes: The most memory that a run needed beyond the memory in use before it; under tensor
            parallelism the largest rank's.
    """

    seconds: tuple[float, ...]
    peak_bytes: int

    @property
    def median(self) -> float:
        return median(self.seconds)


def interleaved(
    computations: Mapping[str, Callable[[], None]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Measurement]:
    """Run every computation once in each round.

    Each has to leave memory as it found it. Each must have run before, so that no code is compiled or
    tuned here.

    Args:
        computations: Name -> a run.
        rounds: Runs of each.
        device: The device that they run on.
        clock: Returns seconds; `time.process_time` for a machine that other work shares.
    """
    seconds: dict[str, list[float]] = {name: [] for name in computations}
    peaks: dict[str, int] = dict.fromkeys(computations, 0)
    for _ in range(rounds):
        for name, run in computations.items():
            elapsed, peak = measured(run, device, clock)
            seconds[name].append(elapsed)
            peaks[name] = max(peaks[name], peak)
    return {name: Measurement(tuple(seconds[name]), peaks[name]) for name in computations}


def measured(
    run: Callable[[], None],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, int]:
    """Return the seconds and peak extra bytes of one run, the largest over the ranks."""
    memory = peak_memory(device.type)
    if dist.is_initialized():
        dist.barrier()
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    result = torch.tensor([clock() - start, memory.peak()], dtype=torch.float64)
    if dist.is_initialized():
        result = result.to(device)
        dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return result[0].item(), int(result[1].item())


class PeakMemory:
    """The most memory in use since this was made.

    Attributes:
        before: Bytes in use when it was made.
    """

    before: int

    def peak(self) -> int:
        """Return the bytes beyond `before`."""
        raise NotImplementedError


class _CudaMemory(PeakMemory):
    """Allocations of torch's caching allocator."""

    def __init__(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before


class _ProcessMemory(PeakMemory):
    """Resident memory of this process, from the kernel's high-water mark.

    A tracker of torch's allocations would miss the allocations inside compiled code and operators. The
    high-water mark includes all of them. Linux resets it on request. Before that, free memory that the
    C library holds back is returned, so that it does not hide a run's memory.
    """

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS")

    def peak(self) -> int:
        return _status("VmHWM") - self.before


def peak_memory(device: str) -> PeakMemory:
    """Begin to watch the memory of this process on "cpu" or "cuda"."""
    return _CudaMemory() if device == "cuda" else _ProcessMemory()


def _status(name: str) -> int:
    """Return bytes from /proc/self/status."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def environment(device: torch.device, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Describe the machine and the versions of a measurement; packages that are not installed are absent."""
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    cores = len(os.sched_getaffinity(0))
    return {
        "date": date.today().isoformat(),
        "hardware": f"{gpus} x {torch.cuda.get_device_name(device)}" if gpus else cpu_name(),
        "cpu_cores": cores,
        "load_average": round(os.getloadavg()[0], 1),  # of the machine, over the last minute
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "megatron-core", *packages)},
    }


def cpu_name() -> str:
    """Return the processor's name, with its matrix units for half precision."""
    text = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    units = [unit for unit in ("avx512_bf16", "amx_bf16") if f" {unit}" in text]
    return " ".join([name.group(1).strip() if name else platform.machine(), *units])


def fast_dtype(device: str) -> str:
    """Return "bf16", or "fp32" where "cpu" or "cuda" only emulates bf16, at a quarter of the speed."""
    return "bf16" if computes_in_bfloat16(device == "cuda") else "fp32"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_results(
    folder: Path, name: str, record: Mapping[str, Any], title: str, body: str
) -> Path:
    """Write `<date>-<name>.json` and `.md`, each whole or not at all; return the latter's path."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = "".join(f"- {key}: {value}\n" for key, value in record["environment"].items())
    command = f"```bash\n{record['command']}\n```\n"
    page = f"# {title}\n\n{facts}\n{command}\n{body}"
    stem = folder / f"{record['environment']['date']}-{name}"
    for suffix, text in ((".json", json.dumps(record, indent=1) + "\n"), (".md", page)):
        part = stem.with_name(f".{stem.name}{suffix}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(stem.with_name(stem.name + suffix))
    return stem.with_name(stem.name + ".md")
