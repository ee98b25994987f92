"""A checkpoint that cannot be written says why."""

from __future__ import annotations

import errno
import queue

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from checkpoint_conversion.errors import ConversionError
from megatron_profit.megatron_patches import saving
from megatron_profit.megatron_patches.callbacks import Callback
from megatron_profit.megatron_patches.saving import _WithReason, reason_of_all_ranks


def test_the_first_rank_tells_the_reason_of_each_rank():
    failed = RuntimeError(
        "Worker failure: OSError 28, No space left on device: iter_3/__1_0.distcp"
    )
    error = CheckpointException("write", {1: (failed, None), 3: (ValueError("odd"), None)})
    assert reason_of_all_ranks(error) == (
        "rank 1: OSError 28, No space left on device: iter_3/__1_0.distcp; rank 3: ValueError: odd"
    )
    assert reason_of_all_ranks(CheckpointException("write", {})) == "another rank failed"
    assert (
        reason_of_all_ranks(OSError(errno.EROFS, "", "f")) == "OSError 30, Read-only file system: f"
    )


def test_a_result_that_is_a_failure_gets_the_reason_of_what_failed():
    results: queue.Queue = queue.Queue()
    errors: list[Exception] = []
    told = _WithReason(results, errors)
    told.put({0: ["written"]})
    assert results.get() == {0: ["written"]}
    hidden = RuntimeError("unexpected pos 704")
    hidden.__context__ = OSError(errno.ENOSPC, "", "f")
    errors.append(hidden)
    told.put(RuntimeError("An error is caught while starting worker 0, error: <class 'OSError'>"))
    assert str(results.get()) == "OSError 28, No space left on device: f"


def full_disk():
    raise OSError(errno.ENOSPC, "", "small")


def full_disk_of_a_conversion():
    """As `write_file`, which names its file."""
    try:
        full_disk()
    except OSError as error:
        raise ConversionError("small: the disk is full") from error


@pytest.mark.parametrize("fail", [full_disk, full_disk_of_a_conversion])
def test_a_file_that_cannot_be_written_does_not_keep_later_callbacks_from_their_collectives(
    monkeypatch, tmp_path, fail
):
    class Full(Callback):
        def with_checkpoint(self, folder, iteration):
            fail()

    class Gathers(Callback):
        iteration = None

        def with_checkpoint(self, folder, iteration):
            self.iteration = iteration

    gathers = Gathers()
    monkeypatch.setattr(saving, "callbacks", lambda: (Full(), gathers))
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_gather_object", lambda found, own: found.__setitem__(0, own))
    with pytest.raises(OSError, match="rank 0: OSError 28, No space left on device: small"):
        saving._write_own_files(tmp_path / "iter_3", 3)
    assert gathers.iteration == 3
