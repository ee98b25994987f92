"""The processes of a run, started by torchrun's own functions in this process."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from megatron_profit.recipe.request import Request

# Signals of schedulers reach the training, which writes a checkpoint and ends. A large one needs more than
# the 30 seconds that torchrun waits.
_SIGNALS, _STOP_SECONDS = "SIGTERM,SIGINT,SIGHUP,SIGUSR1", 300
ENTRY = "megatron_profit.sft"
# Torchrun's loggers that repeat what a process has said.
_TALKATIVE = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
)
_MEMORY = "; the system does this when its memory is full"


def launcher(request: Request, processes: int, run_name: str) -> list[str]:
    """Return torchrun's words before the training's flags.

    Args:
        request: The command line.
        processes: Processes of this node.
        run_name: The name under which several nodes meet.
    """
    front = request.front
    words = ["--nproc-per-node", str(processes)]
    if front.rdzv_endpoint is None:
        words += ["--standalone"]
    else:
        words += ["--nnodes", front.nnodes, "--rdzv-backend", "c10d"]
        words += ["--rdzv-endpoint", front.rdzv_endpoint, "--rdzv-id", front.rdzv_id or run_name]
    words += ["--signals-to-handle", _SIGNALS, "--shutdown-timeout", str(_STOP_SECONDS)]
    return [*words, "-m", ENTRY]


def start(words: Sequence[str], processes: int, cores: int) -> int:
    """Run torchrun with these words until its processes have ended.

    Returns:
        The exit code of the first process that failed; 0 if all went well.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    # Without this, torch 2.15 does not tell a node that joins later where rank 0 is.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        torchrun.run(torchrun.parse_args(list(words)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # the process itself has said why
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        tell(f"process {rank} was ended by {name}{_MEMORY if name == 'SIGKILL' else ''}")
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def tell(message: str) -> None:
    """Print a line of this command."""
    print(f"> {message}", file=sys.stdout, flush=True)
