"""What all tests share: the repository's paths, real inputs that may be absent, and torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"

# One thread per process: the distributed tests run as many processes as there are cores, and more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Prepared data of the tests, for this process and those that it starts.
_CACHE = tempfile.TemporaryDirectory(prefix="megatron-profit-tests-")
os.environ["MEGATRON_PROFIT_CACHE"] = _CACHE.name
sys.path[:0] = [str(REPOSITORY / "tools"), str(REPOSITORY / "tests" / "distributed")]


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Real data and the Qwen3 tokenizer, which lie beside the repository on some machines."""
    if not SHARED.is_dir():
        pytest.skip(f"the real inputs are absent: {SHARED} does not exist")
    return SHARED


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.CompletedProcess]:
    """Runs a module or a script on several processes under torchrun, as a user does."""

    def run(
        world_size: int, *command: object, check: bool = True, timeout: float = 300, **env: str
    ) -> subprocess.CompletedProcess:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        result = subprocess.run(
            [*launcher, "--nproc-per-node", str(world_size), *map(str, command)],
            cwd=REPOSITORY,
            # More processes than GPUs: these tests are of the CPU backend, wherever they run.
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **env},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
        if check and result.returncode:
            pytest.fail(f"{' '.join(map(str, command))} failed:\n{result.stdout[-8000:]}")
        return result

    return run


@pytest.fixture(scope="session")
def sft(torchrun: Callable) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the training entry on the CPU."""

    def run(world_size: int, *flags: object, **options: object) -> subprocess.CompletedProcess:
        entry = ["-m", "megatron_profit.sft", "--device", "cpu", "--lr-decay-style", "constant"]
        return torchrun(world_size, *entry, *flags, **options)

    return run
