"""Before a run begins: one decision for all its ranks on the checkpoint that it starts from.

The first rank looks which checkpoint is whole and, if need be, mends Megatron's tracker file
(`training/checkpoints.py`). The others help it to compare checksums (`training/shared_check.py`), then wait
until they see the same file, over a network file system as well. From then on Megatron reads what all agree
on.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import PrefixStore, Store, rendezvous

from megatron_profit.training.checkpoints import (
    CheckpointError,
    Inspect,
    check_named,
    defect,
    read_tracker,
    same_folder,
    settle,
)
from megatron_profit.training.console import print_rank_0
from megatron_profit.training.save_lock import hold
from megatron_profit.training.shared_check import shared_check

# How long a network file system may take to show a machine what another one has written.
_PATIENCE_SECONDS = 90
# The store that Megatron's process group will use too; where a rank hosts it, it ends with its last user.
_store: Store | None = None


def settle_checkpoints(argv: Sequence[str]) -> None:
    """Let the tracker file in `--load` name a whole checkpoint, the newest if it does not, on all ranks.

    The first rank holds `--save` from then on, if there is such a folder.

    Args:
        argv: The flags of the run.

    Raises:
        CheckpointError: When a checkpoint that is asked for is not whole, or none is, or the ranks do not
            see the same folder, or another run saves there.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--load", "--save", "--pretrained-checkpoint"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--ckpt-step", type=int)
    parser.add_argument("--skip-checksums", action="store_true")
    flags = parser.parse_known_args(argv)[0]
    if flags.save is not None and flags.save.is_dir():
        hold(flags.save)
    if flags.load is None and flags.pretrained_checkpoint is None:
        return
    with shared_check(_shared, skip=flags.skip_checksums) as inspect:
        if inspect is not None:
            decided = _decide(flags, inspect)
    if flags.load is None:
        return
    if os.environ.get("RANK", "0") == "0":
        _publish(decided)
    else:
        _wait_for(flags.load)


def _decide(flags: argparse.Namespace, inspect: Inspect) -> str:
    """Check, on the first rank, what the run may start from.

    Returns:
        What the tracker file in `--load` holds now; "" where there is no checkpoint.
    """
    decided = ""
    if flags.load is not None:
        own = same_folder(flags.load, flags.save)
        # With --ckpt-step, another checkpoint than the one in the tracker file is read.
        first = defect if flags.ckpt_step else inspect
        decided = settle(
            flags.load, lambda m: print_rank_0(f"WARNING: {m}"), is_own=own, inspect=first
        )
        if flags.ckpt_step:
            check_named(flags.load, flags.ckpt_step, inspect)
    if flags.pretrained_checkpoint is not None:
        check_named(flags.pretrained_checkpoint, None, defect if decided else inspect)
    return decided


def check_checkpoints(argv: Sequence[str]) -> None:
    """Check the checkpoint that a program reads and does not write, on all ranks.

    Raises:
        CheckpointError: It is not whole.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--ckpt-step", type=int)
    parser.add_argument("--skip-checksums", action="store_true")
    flags = parser.parse_known_args(argv)[0]
    if flags.load is not None:
        with shared_check(_shared, skip=flags.skip_checksums) as inspect:
            if inspect is not None:
                check_named(flags.load, flags.ckpt_step, inspect)


def _publish(decided: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _shared().set("checkpoint", decided)


def _wait_for(load: Path) -> None:
    decided = _shared().get("checkpoint").decode()  # waits for the first rank
    end = time.monotonic() + _PATIENCE_SECONDS
    while read_tracker(load) != decided:
        if time.monotonic() > end:
            raise CheckpointError(
                f"--load {load} holds checkpoint {read_tracker(load) or 'none'!r} here and "
                f"{decided or 'none'!r} for the first rank; the folder must be on a file system that all "
                "machines share"
            )
        time.sleep(0.2)


def _shared() -> Store:
    global _store
    if _store is None:
        _store = PrefixStore("megatron_profit", next(rendezvous("env://"))[0])
    return _store
