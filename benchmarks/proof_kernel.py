"""The kernel's table of a proof: the operation against others, and where its own time goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import bench_objective
import benchmarking
import torch
from proof_runs import SIZES
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_PROFILED_RUNS = 5
_ROWS = 12


def kernel_configurations(device: str) -> list[tuple[Any, bench_objective.Configuration]]:
    """Return the configurations of the kernel's table, each with the options of its part."""
    parts = [
        bench_objective.parse_arguments([*flags, "--device", device])
        for flags in SIZES[device].kernel
    ]
    return [(part, config) for part in parts for config in bench_objective.configurations(part)]


def measure_kernel(device: str, number: int, rendezvous: str) -> dict[str, Any]:
    """Measure one configuration of the kernel's table in this process; return its record.

    The record of the first configuration has a profile.
    """
    (options, config), target = kernel_configurations(device)[number], torch.device(device)
    with benchmarking.group_of_one(device, rendezvous):
        record = bench_objective.run_configuration(options, config, target)
        record["title"] = str(config)
        if number == 0:
            record["profile"] = profile_ours(bench_objective.Problem.of(config, target))
    return record


def profile_ours(problem: bench_objective.Problem) -> dict[str, Any]:
    """Profile forward and backward of the operation.

    Returns:
        Of one run: "milliseconds" of the device, "launches" on it, and for each kind of work, the longest
        first, its name, milliseconds and calls. On a CPU the work is torch's operators.
    """
    step, device = bench_objective.ours(), problem.hidden.device
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for is_profiled in (False, True):
        with profile(activities=activities) as profiler:
            for _ in range(_PROFILED_RUNS if is_profiled else 1):
                loss = step(problem)
                assert loss is not None
                loss.backward()
                problem.hidden.grad = problem.weight.grad = None
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    microseconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == kind:
            spent = (
                event.self_device_time_total
                if kind == DeviceType.CUDA
                else event.self_cpu_time_total
            )
            microseconds[event.name] += spent
            calls[event.name] += 1
    return {
        "milliseconds": sum(microseconds.values()) / 1e3 / _PROFILED_RUNS,
        "launches": sum(calls.values()) / _PROFILED_RUNS,
        "work": [
            [name, spent / 1e3 / _PROFILED_RUNS, calls[name] / _PROFILED_RUNS]
            for name, spent in microseconds.most_common()
        ],
    }


def profile_table(found: Mapping[str, Any]) -> str:
    """Return a profile as Markdown."""
    rows = [
        [name[:60].replace("|", " "), f"{milliseconds:,.2f}", f"{calls:,.1f}"]
        for name, milliseconds, calls in found["work"][:_ROWS]
    ]
    total = ["all", f"{found['milliseconds']:,.2f}", f"{found['launches']:,.0f}"]
    header = ("where the time of `ours` goes, first configuration", "ms", "calls")
    return benchmarking.markdown_table(header, [*rows, total])
