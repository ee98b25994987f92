"""Signals that end a run: checkpoint first, then an exit code that tells a scheduler to start it again.

Megatron's `--exit-signal-handler` saves and leaves the loop after the step in which any rank has received
one signal. Clusters send two: SIGTERM, and SIGUSR1 some time before a limit (Slurm's `--signal`). Both lead
to Megatron's handler here. While the process has none yet, or no longer, they end it at once.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

import torch
from megatron.training.global_vars import get_args, get_signal_handler

from megatron_profit.training.console import print_rank_0
from megatron_profit.training.shutdown import end_communication

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


class ExitSignals:
    """Those that this rank has received.

    Args:
        handled: The one that Megatron handles (`--exit-signal`).
    """

    def __init__(self, handled: signal.Signals) -> None:
        self._handled = handled
        self._received = 0

    def forward(self) -> None:
        """Let the others lead to the one that Megatron handles."""
        for other in FORWARDED:
            if other != self._handled:
                signal.signal(other, self._on_signal)

    def release(self) -> None:
        """Let all end the process at once again, because nothing is left to be saved."""
        get_signal_handler().release()
        for other in FORWARDED:
            signal.signal(other, signal.SIG_DFL)

    def leave(self, end: SystemExit) -> NoReturn:
        """End a run that has left Megatron's loop before its last step. All ranks come here together.

        Raises:
            SystemExit: With 128 and the number of the signal, if there was one, as a shell would say.
        """
        if end.code != 0:
            raise end
        number = self._of_all_ranks()
        if number:
            print_rank_0(_last_words(signal.Signals(number)))
        end_communication()
        raise SystemExit(128 + number if number else 0) from None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        signal.raise_signal(self._handled)

    def _of_all_ranks(self) -> int:
        by_rank = get_signal_handler().signals_received()
        number = self._received
        if not number and by_rank[torch.distributed.get_rank()]:
            number = int(self._handled)
        device = "cpu" if torch.distributed.get_backend() == "gloo" else "cuda"
        largest = torch.tensor(number, device=device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return int(largest.item())


def _last_words(received: signal.Signals) -> str:
    args = get_args()
    done = f"> stopped by {received.name} after iteration {args.curr_iteration + 1} of {args.train_iters}"
    if args.save is None:
        return f"{done}; nothing was saved, because there is no --save; exit code {128 + received}"
    return (
        f"{done}; checkpoint in {args.save}; the same command, with --load {args.save}, goes on from there; "
        f"exit code {128 + received}"
    )
