"""The processes of a run, started by torchrun's own functions in this process."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from megatron_profit.estimates.saving import seconds_to_end
from megatron_profit.launch.run_folder import RunFolder
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.recipe.request import Request

# Signals of schedulers reach the training, which writes a checkpoint and ends.
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGUSR1"
# Environment variables of every run.
_ENVIRONMENT = {
    # Rows of many lengths leave less of a GPU's memory unused.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "NCCL_DEBUG": "WARN",
    # Without this, torch 2.15 does not tell a node that joins later where rank 0 is.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
ENTRY = "megatron_profit.sft"
# Torchrun's loggers that repeat what a process has said.
_TALKATIVE = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
)
_MEMORY = "; the system does this when its memory is full"


def environment(checkpoint: int) -> dict[str, str]:
    """Return the environment variables of a run; one that is set already stays as it is.

    Args:
        checkpoint: Bytes of a checkpoint. By them torchrun waits for the last one, in place of 30 seconds.
            (torch 2.10 does not read the variable.)
    """
    return {**_ENVIRONMENT, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(seconds_to_end(checkpoint))}


def exports(checkpoint: int) -> str:
    """Return the lines of a shell script that set the variables of `environment`."""
    values = environment(checkpoint).items()
    return "\n".join(f"export {name}=${{{name}:-{value}}}" for name, value in values)


def launcher(request: Request, processes: int, run: RunFolder) -> list[str]:
    """Return torchrun's words before the training's flags; torch 2.10 and all later ones know them.

    Args:
        request: The command line.
        processes: Processes of this node.
        run: The folder of the run; its name is the one under which several nodes meet.
    """
    front = request.front
    words = ["--nproc-per-node", str(processes)]
    if front.rdzv_endpoint is None:
        words += ["--standalone"]
    else:
        words += ["--nnodes", front.nnodes, "--rdzv-backend", "c10d"]
        words += [
            "--rdzv-endpoint",
            front.rdzv_endpoint,
            "--rdzv-id",
            front.rdzv_id or run.path.name,
        ]
    if front.max_restarts:
        words += ["--max-restarts", str(front.max_restarts)]
    if front.rank_logs:
        words += ["--log-dir", str(run.logs / os.uname().nodename), "--tee", "3"]
    words += ["--signals-to-handle", _SIGNALS]
    return [*words, "-m", ENTRY]


def start(words: Sequence[str], processes: int, cores: int, checkpoint: int) -> int:
    """Run torchrun with these words until its processes have ended.

    Args:
        words: The words of the torchrun command, without its name.
        processes: Processes of this node.
        cores: Cores of this node.
        checkpoint: Bytes of a checkpoint.

    Returns:
        The exit code of the first process that failed; 0 if all went well.

    Raises:
        LaunchError: The nodes do not find each other.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, cores // processes))}
    for variable, value in (threads | environment(checkpoint)).items():
        os.environ.setdefault(variable, value)
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

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
    except RendezvousError as error:
        raise LaunchError(
            f"the nodes cannot meet ({error.__cause__ or error}); start the same command on each node, with "
            "--rdzv-endpoint HOST:PORT of one that all others reach"
        ) from error
    return 0


def tell(message: str) -> None:
    """Print a line of this command."""
    print(f"> {message}", file=sys.stdout, flush=True)
