"""The patches: what is changed upstream, when, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_profit import megatron_patches


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=600)


def test_every_patch_says_what_it_changes_and_why():
    patches = megatron_patches.all_patches()
    assert len({p.name for p in patches}) == len(patches)
    for p in patches:
        assert p.functions
        assert all(f.startswith(("megatron/", "torch/")) and ":" in f for f in p.functions)
        assert p.reason.endswith(".")


def test_unknown_devices_are_refused():
    with pytest.raises(ValueError, match=r"tpu.*auto, cpu, cuda"):
        megatron_patches.activate("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="no GPU"):
        megatron_patches.activate("cuda")


def test_the_cpu_backend_says_so_and_makes_cuda_mean_the_cpu():
    result = run_python(
        "from megatron_profit.megatron_patches import activate\n"
        "assert activate('cpu') == 'cpu'\n"
        "import torch\n"
        "assert torch.zeros(2, device='cuda').device.type == 'cpu'\n"
        "assert torch.zeros(2).to('cuda:0').device.type == 'cpu'\n"
        "assert torch.device(f'cuda:{torch.cuda.current_device()}').type == 'cpu'\n"
        "assert torch.zeros(2).to(0).device.type == 'cpu'\n"
        "assert torch.zeros(2).to(torch.float64).dtype == torch.float64\n"
        "assert torch.tensor(3, device=torch.device('cuda', 1)).cuda().item() == 3\n"
        "assert torch.zeros(2).type() == 'torch.cuda.FloatTensor'\n"
        "assert torch.zeros(2).type(torch.int32).dtype == torch.int32\n"
        "torch.cuda.manual_seed(5); a = torch.rand(3)\n"
        "torch.manual_seed(5); assert torch.equal(a, torch.rand(3))\n"
        "assert activate('auto') == 'cpu'\n"
    )
    assert result.returncode == 0, result.stderr
    assert "CPU backend" in result.stdout


def test_the_cpu_backend_refuses_to_come_too_late():
    result = run_python(
        "import megatron.core\nfrom megatron_profit.megatron_patches import activate\nactivate('cpu')\n"
    )
    assert result.returncode != 0
    assert "imported before" in result.stderr


@pytest.mark.slow
def test_on_a_gpu_no_cpu_patch_is_active():
    result = run_python(
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "from megatron_profit.megatron_patches import activate, applied_patches\n"
        "assert activate() == 'cuda'\n"
        "assert not any(name.startswith('cpu-') for name in applied_patches())\n"
    )
    assert result.returncode == 0, result.stderr


QUEUE = """
from megatron_profit.megatron_patches import activate
activate('cpu')
import os, queue, signal, time
from argparse import Namespace
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.training.global_vars import set_args
args = Namespace(async_save=False)
set_args(args)
results = filesystem_async.get_write_results_queue()
assert type(results) is queue.Queue, 'a save that waits for its end needs no process'
filesystem_async._results_queue, args.async_save = None, True
results = filesystem_async.get_write_results_queue()
process = results._manager._process.pid
"""


@pytest.mark.slow
def test_the_queue_of_a_save_ends_with_a_killed_rank_and_not_by_a_signal_that_asks_for_the_save():
    """torchrun sends a signal to all processes of a rank. Only an asynchronous save has a process."""
    result = run_python(
        f"{QUEUE}"
        "for ends in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):\n"
        "    os.kill(process, ends)\n"
        "time.sleep(0.2)\n"
        "results.put(1)\n"
        "print(process, results.get(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    process, received = result.stdout.splitlines()[-1].split()
    assert received == "1"
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{process}").exists(), "the queue's process outlives its rank"


def test_transformer_engine_is_to_find_the_cudnn_that_torch_was_installed_with(
    monkeypatch, tmp_path
):
    for name in (
        "CUDNN_HOME",
        "CUDNN_PATH",
    ):  # set first, so that the end of the test takes them away
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    (tmp_path / "nvidia" / "cudnn").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CUDNN_PATH", "one of the user's")
    megatron_patches._keep_to_the_cudnn_of_torch()
    assert "CUDNN_HOME" not in os.environ
    monkeypatch.delenv("CUDNN_PATH")
    megatron_patches._keep_to_the_cudnn_of_torch()
    assert os.environ["CUDNN_HOME"] == str(tmp_path / "nvidia" / "cudnn")
