"""The checksums of a checkpoint, compared before Megatron loads it, by all processes of a run together.

One process would read a large checkpoint for longer than the run takes to load it. So each one reads a share,
and the first one collects their findings. This happens before Megatron has a process group, over the store
that the group will use.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import Store

from checkpoint_conversion.engine.workers import worker_count
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.progress import duration, human
from checkpoint_conversion.torch_dist.integrity import check_content, check_present, size_of
from megatron_profit.training.checkpoints.folder import CheckpointError, Inspect, problem_of
from megatron_profit.training.process.console import print_rank_0
from megatron_profit.training.process.ranks import PATIENCE_SECONDS, is_seen_in_time

_PROGRESS_SECONDS = 10
# Longer than any check. If a process ends before, torchrun ends the others.
_FOREVER = timedelta(days=7)
# Answers of a rank that finds no damage, and of one that cannot look.
_SOUND, _NOT_SEEN = "sound", "not seen: "


@contextlib.contextmanager
def shared_check(store: Callable[[], Store], *, skip: bool) -> Iterator[Inspect | None]:
    """Let the first rank inspect checkpoints in the block, with the help of all others.

    Args:
        store: Gives the store in which the ranks find each other.
        skip: Compare no checksums; then the first rank alone looks whether a checkpoint is whole.

    Yields:
        On the first rank, the function that returns why a checkpoint cannot be loaded. None on the others,
        whose help is over by then.
    """
    rank, ranks = (int(os.environ.get(*name)) for name in (("RANK", "0"), ("WORLD_SIZE", "1")))
    check = _SharedCheck(store, rank, 1 if skip else ranks)
    if rank > 0 and not skip:
        check.help()
    yield (problem_of if skip else check.inspect) if rank == 0 else None
    if rank == 0:
        check.dismiss()


class _SharedCheck:
    """A check of which each rank does a share, in rounds: the first rank asks, all answer."""

    def __init__(self, store: Callable[[], Store], rank: int, ranks: int) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self._round = 0

    def inspect(self, folder: Path) -> str | None:
        """Return why a checkpoint cannot be loaded (parts are missing or damaged); None for a sound one.

        Raises:
            CheckpointError: Another machine does not see the same files.
        """
        found = problem_of(folder)
        if found is not None:
            return found
        start, nbytes = time.monotonic(), size_of(folder)
        by = "1 process" if self._ranks == 1 else f"{self._ranks} processes"
        self._ask(str(folder))
        answers = [damage_of_share(folder, 0, self._ranks)]
        answers += [self._answer(rank) for rank in range(1, self._ranks)]
        took = duration(time.monotonic() - start)
        print_rank_0(f"> checksums of {folder} compared: {human(nbytes)} in {took}, by {by}")
        return next((answer for answer in answers if answer is not None), None)

    def dismiss(self) -> None:
        """Let the other ranks out of `help`."""
        self._ask("")

    def help(self) -> None:
        """Read this rank's share of each checkpoint that the first rank asks for, until it needs no more."""
        while folder := self._asked():
            try:
                wait_until_present(Path(folder))
                answer = damage_of_share(Path(folder), self._rank, self._ranks) or _SOUND
            except CheckpointError as error:
                answer = f"{_NOT_SEEN}{error}"
            self._store().set(f"check/{self._round}/{self._rank}", answer)

    def _ask(self, folder: str) -> None:
        self._round += 1
        if self._ranks > 1:
            self._store().set(f"check/{self._round}", folder)

    def _asked(self) -> str:
        self._round += 1
        return self._get(f"check/{self._round}")

    def _answer(self, rank: int) -> str | None:
        answer = self._get(f"check/{self._round}/{rank}")
        if answer.startswith(_NOT_SEEN):
            raise CheckpointError(answer.removeprefix(_NOT_SEEN))
        return None if answer == _SOUND else answer

    def _get(self, key: str) -> str:
        self._store().wait([key], _FOREVER)
        return self._store().get(key).decode()


def check_together(folder: Path) -> None:
    """Compare the checksums of a checkpoint on all ranks of Megatron's process group, which all call this.

    Raises:
        ConversionError: Any rank has found it damaged.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(found, damage_of_share(folder, rank, ranks))
    message = next((message for message in found if message is not None), None)
    if message is not None:
        raise ConversionError(message)


def wait_until_present(folder: Path, patience: float = PATIENCE_SECONDS) -> None:
    """Wait until this machine sees all files of a checkpoint that the first rank sees.

    Raises:
        CheckpointError: It does not after `patience` seconds.
    """
    last: Exception | None = None

    def is_present() -> bool:
        nonlocal last
        try:
            check_present(folder)
        except (ConversionError, OSError) as error:
            last = error
            return False
        return True

    if not is_seen_in_time(is_present, patience):
        raise CheckpointError(
            f"a machine does not see the checkpoint that the first one sees: {last}; the folder must be on a "
            "file system that all machines share"
        ) from last


def damage_of_share(folder: Path, number: int, of: int) -> str | None:
    """Return the first fault in a share of a checkpoint; None for a sound one."""
    ticker = _Ticker(folder)
    threads = max(1, worker_count(None) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    try:
        check_content(folder, number, of, threads, ticker.add)
    except (ConversionError, OSError) as error:
        return str(error)
    return None


class _Ticker:
    """Tells now and then how far the first rank is."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._done, self._told = folder, 0, time.monotonic()
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if time.monotonic() - self._told > _PROGRESS_SECONDS:
                self._told = time.monotonic()
                print_rank_0(
                    f"> checksums of {self._folder.name}: {human(self._done)} by the first process"
                )
