"""A function of a test on several ranks, without Megatron."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

# Whoever imports it first, as torch._dynamo does, keeps the group of all ranks in its functions' defaults.
# Gloo's threads would then outlive the group's end, and could abort the process at that of the interpreter.
import torch.distributed.nn.functional
import torch.multiprocessing as mp


def spawn_ranks(function: Callable[[dist.ProcessGroup], None], ranks: int, folder: Path) -> None:
    """Call `function`, which can be pickled, with the group of all ranks on each.

    Args:
        function: Fails by an exception.
        ranks: How many.
        folder: Empty; where the ranks meet.
    """
    alone = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    with mock.patch.dict(os.environ, alone):
        mp.spawn(_on_a_rank, args=(function, ranks, folder / "rendezvous"), nprocs=ranks)


def _on_a_rank(
    rank: int, function: Callable[[dist.ProcessGroup], None], ranks: int, rendezvous: Path
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    function(dist.group.WORLD)
    dist.destroy_process_group()
