"""Shared fixtures of all tests: the repository's paths, real inputs that may be absent, and torchrun."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"

# The same examples in every run, however busy the machine is.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")
# A shell starts a command in the background with SIGINT ignored, which its children would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# One thread per process: the distributed tests run as many processes as there are cores, and more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The CPU backend's tests may run more processes than there are GPUs, so no GPU is visible to them.
_WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}
# Prepared data of the tests, for this process and those that it starts.
_CACHE = tempfile.TemporaryDirectory(prefix="megatron-profit-tests-")
os.environ["MEGATRON_PROFIT_CACHE"] = _CACHE.name
sys.path[:0] = [str(REPOSITORY / name) for name in ("tools", "benchmarks", "tests/distributed")]


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Return the folder of real data and the Qwen3 tokenizer, next to the repository on some machines."""
    if not SHARED.is_dir():
        pytest.skip(f"the real inputs are absent: {SHARED} does not exist")
    return SHARED


@pytest.fixture(scope="session")
def real_model(tmp_path_factory) -> Path:
    """Return the folder of a small real pretrained model, which `tools/make_real_model.py` makes."""
    import make_real_model

    from checkpoint_conversion.errors import ConversionError

    pytest.importorskip("gguf", reason="gguf is not installed")
    try:
        make_real_model.packaged_file()
    except ConversionError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("real") / "SmolLM2"
    assert make_real_model.main(["--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs a module or a script under torchrun, as a user does."""

    def run(
        world_size: int, *command: object, check: bool = True, timeout: float = 300, **env: str
    ) -> subprocess.CompletedProcess:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        result = subprocess.run(
            [*launcher, "--nproc-per-node", str(world_size), *map(str, command)],
            cwd=REPOSITORY,
            env={**os.environ, **_WITHOUT_GPU, **env},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
        return _checked(result, check)

    return run


@pytest.fixture(scope="session")
def ranks(tmp_path_factory) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Yield a function like `torchrun`'s, whose ranks start in a fraction of the time."""
    server = subprocess.Popen(
        [sys.executable, REPOSITORY / "tests" / "rank_server.py"],
        cwd=REPOSITORY,
        env={**os.environ, **_WITHOUT_GPU},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    outputs = tmp_path_factory.mktemp("ranks")
    numbers = itertools.count()

    def run(
        world_size: int, *command: object, check: bool = True, timeout: float = 300, **env: str
    ) -> subprocess.CompletedProcess:
        output = outputs / f"{next(numbers)}.log"
        request = {
            "command": [str(part) for part in command],
            "world_size": world_size,
            "cwd": str(REPOSITORY),
            "env": {**os.environ, **_WITHOUT_GPU, **env},
            "output": str(output),
            "timeout": timeout,
        }
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = json.loads(server.stdout.readline())
        printed = output.read_text(errors="replace") if output.exists() else ""
        if answer["timed_out"]:
            pytest.fail(f"{' '.join(request['command'])} took over {timeout} s:\n{printed[-8000:]}")
        result = subprocess.CompletedProcess(command, answer["returncode"], printed)
        return _checked(result, check)

    yield run
    server.stdin.close()
    server.wait(timeout=60)


def _checked(result: subprocess.CompletedProcess, check: bool) -> subprocess.CompletedProcess:
    if check and result.returncode:
        pytest.fail(f"{' '.join(map(str, result.args))} failed:\n{result.stdout[-8000:]}")
    return result


@pytest.fixture(scope="session")
def sft(ranks: Callable) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs the training entry on the CPU."""

    def run(world_size: int, *flags: object, **options: object) -> subprocess.CompletedProcess:
        entry = ["-m", "megatron_profit.sft", "--device", "cpu", "--lr-decay-style", "constant"]
        return ranks(world_size, *entry, *flags, **options)

    return run
