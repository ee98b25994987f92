"""torchrun's agent and its ranks as forks of a process that has imported Megatron already.

Importing it takes several times what the steps between two kills take. Everything else is what torchrun does:
its rendezvous, its agent, its store, its restarts, its handling of signals.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import uuid
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock


@functools.cache
def context() -> ForkServerContext:
    """Where such processes come from."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["preloaded_megatron"])
    # The server does not share sys.path, and passes over what it does not find.
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(folders)):
        forkserver.ensure_running()
    return forks


def launch(
    world_size: int, flags: list[str], log: Path, max_restarts: int, env: dict[str, str]
) -> None:
    """Be `torchrun --standalone`; does not return."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(env)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        start_method="fork",
    )
    elastic_launch(config, _rank)(flags)
    sys.exit(0)


def _rank(flags: list[str]) -> None:
    from megatron_profit.sft import main

    sys.argv = ["megatron_profit.sft", *flags]
    main()
