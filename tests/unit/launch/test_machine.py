"""What a machine has: the memory that is available, and a driver that does not answer."""

import subprocess

import pytest

from megatron_profit.launch import machine
from megatron_profit.launch.machine import available_memory
from megatron_profit.recipe.errors import LaunchError

GB = 10**9


@pytest.fixture
def system(tmp_path):
    """system(files): a root folder with /proc/meminfo of 64 GB and these files of control groups."""

    def make(files):
        for name, text in files.items():
            file = tmp_path / "sys" / "fs" / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (tmp_path / "proc").mkdir()
        lines = (
            f"MemTotal:  99000000 kB\nMemAvailable:  {64 * GB // 1024} kB\nHugePages_Total:  0\n"
        )
        (tmp_path / "proc" / "meminfo").write_text(lines)
        return tmp_path

    return make


def test_without_a_limit_it_is_the_systems(system):
    files = {
        "memory.max": "max\n",
        "memory.current": f"{9 * GB}\n",
        "memory.stat": "inactive_file 0\n",
    }
    assert available_memory(system(files)) == 64 * GB // 1024 * 1024


@pytest.mark.parametrize(
    "names",
    [
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ],
)
def test_files_that_were_read_do_not_count_as_used(system, names):
    """A model of 20 GB in the page cache leaves a container of 32 GB its memory."""
    limit, used, statistics, cache = names
    files = {
        limit: f"{32 * GB}\n",
        used: f"{22 * GB}\n",
        statistics: f"anon {2 * GB}\ninactive_anon 1\n{cache} {20 * GB}\nactive_file 0\n",
    }
    assert available_memory(system(files)) == 30 * GB


def test_a_group_that_uses_more_than_its_limit_has_none(system):
    files = {"memory.max": "5", "memory.current": "7", "memory.stat": "inactive_file 1"}
    assert available_memory(system(files)) == 0


def test_a_driver_that_does_not_answer_is_a_clear_error(monkeypatch):
    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(machine, "has_driver", lambda: True)
    monkeypatch.setattr(machine.subprocess, "run", hang)
    with pytest.raises(LaunchError, match=r"not answered torch in 300 seconds.*--device cpu"):
        machine.this_machine()
