"""Changes to how Megatron writes checkpoints: a run adds files of its own, and a failure gives its reason."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from checkpoint_conversion.errors import ConversionError
from megatron_profit.megatron_patches.callbacks import RunFailure, callbacks
from megatron_profit.megatron_patches.enduring import reason
from megatron_profit.megatron_patches.patch import Patch


def _announce_checkpoints() -> None:
    import torch
    from megatron.core import dist_checkpointing

    original = dist_checkpointing.save
    # Files left from earlier saves have been removed before: the ones in the folder have just been put there.
    logging.getLogger("megatron.core.dist_checkpointing.serialization").addFilter(
        lambda record: "Overwriting old incomplete" not in record.getMessage()
    )

    @functools.wraps(original)
    def save(sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        iteration, folder = sharded_state_dict.get("iteration"), Path(checkpoint_dir)
        if iteration is not None:
            size = _size_of_all_ranks(sharded_state_dict)
            for callback in callbacks():
                callback.before_checkpoint(folder, iteration, size)
            torch.distributed.barrier()
            _write_own_files(folder, iteration)
        return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    dist_checkpointing.save = save


def _write_own_files(folder: Path, iteration: int) -> None:
    """Let all callbacks write on each rank, and let all ranks fail if one cannot.

    A rank that stopped at the first error would let the others wait for it, in the next callback's collective
    or here.
    """
    import torch

    failed: ConversionError | OSError | None = None
    folder_made = functools.partial(folder.mkdir, parents=True, exist_ok=True)
    writes = [functools.partial(each.with_checkpoint, folder, iteration) for each in callbacks()]
    for write in (folder_made, *writes):
        try:
            write()
        except (ConversionError, OSError) as error:
            failed = failed or error
    everyone: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, reason(failed) if failed else None)
    for rank, problem in enumerate(everyone):
        if problem is not None:
            raise OSError(f"rank {rank}: {problem}") from failed


def _size_of_all_ranks(sharded_state_dict: Any) -> int:
    """Return the bytes of the tensors that the ranks will write, each of which is written by one rank."""
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedTensor,
        ShardedTensorFactory,
        is_main_replica,
    )

    size = sum(
        item.data.nbytes
        for item in nested_values(sharded_state_dict)
        if isinstance(item, ShardedTensor | ShardedTensorFactory)
        and is_main_replica(item.replica_id)
    )
    total = torch.tensor(size, dtype=torch.int64, device="cuda")
    torch.distributed.all_reduce(total)
    return int(total)


def _announce_saved_checkpoints() -> None:
    from megatron.training import checkpointing, training
    from megatron.training.global_vars import get_args
    from torch.distributed.checkpoint import CheckpointException

    original, schedule = training.save_checkpoint, checkpointing.schedule_async_save
    saving = 0

    def announce(iteration: int) -> None:
        for callback in callbacks():
            callback.after_checkpoint(iteration)

    @functools.wraps(original)
    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal saving
        saving = iteration
        try:
            result = original(iteration, *args, **kwargs)
        except (CheckpointException, OSError) as error:
            raise RunFailure(
                f"the checkpoint of step {iteration} was not written: {reason_of_all_ranks(error)}; those "
                f"before it are as they were in {get_args().save}"
            ) from error
        if not get_args().async_save:
            announce(iteration)
        return result

    @functools.wraps(schedule)
    def schedule_async_save(request: Any) -> Any:
        # After the function that writes the tracker file.
        request.add_finalize_fn(functools.partial(announce, saving))
        return schedule(request)

    training.save_checkpoint = save_checkpoint
    checkpointing.schedule_async_save = schedule_async_save


def reason_of_all_ranks(error: BaseException) -> str:
    """Say in a few words why a checkpoint was not written. Only the first rank knows the others' reasons."""
    failures = getattr(error, "failures", None)
    if failures is None:
        return reason(error)
    told = [
        f"rank {rank}: {reason(failure).removeprefix('RuntimeError: Worker failure: ')}"
        for rank, (failure, _) in failures.items()
    ]
    return "; ".join(told) or "another rank failed"


def _keep_the_reason_of_a_failed_write() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync
    write, write_all = writer.write_preloaded_data, writer.write_preloaded_data_multithread
    errors: list[Exception] = []

    @functools.wraps(write)
    def write_preloaded_data(*args: Any, **kwargs: Any) -> Any:
        result = write(*args, **kwargs)
        if isinstance(result[1], Exception):
            errors.append(result[1])
        return result

    @functools.wraps(write_all)
    def write_preloaded_data_multithread(
        transforms: Any, use_msc: bool, rank: int, buckets: Any, results: Any
    ) -> None:
        errors.clear()
        try:
            write_all(transforms, use_msc, rank, buckets, _WithReason(results, errors))
        except AssertionError:
            # From a thread that failed: the queue, for which all ranks wait, is still empty.
            results.put(OSError(reason(errors[0])))

    writer.write_preloaded_data = staticmethod(write_preloaded_data)
    writer.write_preloaded_data_multithread = staticmethod(write_preloaded_data_multithread)


class _WithReason:
    """A queue of results in which a failure carries its reason."""

    def __init__(self, results: Any, errors: list[Exception]) -> None:
        self._results, self._errors = results, errors

    def put(self, result: Any) -> None:
        if isinstance(result, Exception) and self._errors:
            result = OSError(reason(self._errors[0]))
        self._results.put(result)


SAVING_PATCHES = (
    Patch(
        name="with-checkpoint",
        functions=("megatron/core/dist_checkpointing/serialization.py:save",),
        reason="save_checkpoint has no place for the state of a run that is not one of model, optimizer "
        "or data loader, and writes among whatever a save that died has left in the folder.",
        apply=_announce_checkpoints,
    ),
    Patch(
        name="after-checkpoint",
        functions=(
            "megatron/training/checkpointing.py:save_checkpoint",
            "megatron/training/async_utils.py:schedule_async_save",
        ),
        reason="There is no hook after the tracker file is written, which is the moment from which older "
        "checkpoints are not needed. A failure names only the class of its exception.",
        apply=_announce_saved_checkpoints,
    ),
    Patch(
        name="reason-of-a-failed-write",
        functions=(
            "megatron/core/dist_checkpointing/strategies/filesystem_async.py:FileSystemWriterAsync.write_preloaded_data",
            "megatron/core/dist_checkpointing/strategies/filesystem_async.py:FileSystemWriterAsync.write_preloaded_data_multithread",
        ),
        reason="Of a failed write only the class of the exception is kept; and where a second thread writes, "
        "the rank ends and the others wait for it.",
        apply=_keep_the_reason_of_a_failed_write,
    ),
)
