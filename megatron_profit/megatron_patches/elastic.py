"""Changes to PyTorch that torchrun's restarts need on every device."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

from megatron_profit.megatron_patches.patch import Patch


def _begin_each_attempt_with_an_empty_store() -> None:
    from torch.distributed import PrefixStore

    # As an attribute of torch.distributed, a function of the same name hides the module.
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    original = rendezvous._create_c10d_store

    @functools.wraps(original)
    def create(*args: Any, **kwargs: Any) -> Any:
        store = original(*args, **kwargs)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return store
        # Compares the number of ranks too: a node that joins or leaves is no failure, and does not count.
        # Where several nodes may restart, `check_restarts` of the entry refuses this store.
        attempt, ranks = (os.environ[n] for n in ("TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE"))
        return PrefixStore(f"attempt_{attempt}_of_{ranks}", store)

    rendezvous._create_c10d_store = create


TORCH_PATCHES = (
    Patch(
        name="store-of-each-attempt",
        functions=("torch/distributed/rendezvous.py:_create_c10d_store",),
        reason="With --max-restarts, the ranks that torchrun starts again find the addresses of the dead "
        "ones in the store of the agent, which it keeps, and try to connect to them.",
        apply=_begin_each_attempt_with_an_empty_store,
    ),
)
