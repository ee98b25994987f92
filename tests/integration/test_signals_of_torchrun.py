"""What Ctrl-C does to a run under torchrun itself, which sends it to all processes of each rank."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killable_runs import steps

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "examples" / "data"


@pytest.mark.slow
def test_ctrl_c_saves_also_after_the_first_checkpoint(tiny, tmp_path):
    log, save = tmp_path / "log", tmp_path / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2),
        *("-m", "megatron_profit.sft", "--device", "cpu", "--hf-model", tiny, "--random-init"),
        *("--data", DATA / "arithmetic_base.jsonl", "--seq-length", 48, "--micro-batch-size", 2),
        *("--objective", "sft", "--lr", 1e-3, "--train-iters", 100_000, "--num-workers", 1),
        *("--save", save, "--load", save, "--save-interval", 3, "--keep-last", 1),
    ]
    with log.open("w") as output:
        # A session of its own, as a terminal gives to what it starts.
        run = subprocess.Popen(
            list(map(str, command)),
            cwd=REPOSITORY,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 240
        while 5 not in steps(log.read_text()) and run.poll() is None:
            assert time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)
        run.wait(timeout=120)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    printed = log.read_text()
    stopped = re.search(r"> stopped by SIGINT after iteration (\d+) of", printed)
    assert stopped, printed[-6000:]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == stopped[1]
    assert "> Ctrl-C: the run ends after this step" in printed
