"""A checkpoint that cannot be written says why."""

from __future__ import annotations

import errno
import queue

from torch.distributed.checkpoint import CheckpointException

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
