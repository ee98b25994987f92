"""Signals that end a run: first a checkpoint, then an exit code that makes a scheduler start the run again.

Megatron's `--exit-signal-handler` saves and leaves the loop after the step in which any rank has received one
signal. Other signals are forwarded to Megatron's handler here: SIGTERM, SIGUSR1, which clusters send some
time before a limit (Slurm's `--signal`), SIGHUP, and SIGINT (Ctrl-C). Before the handler is set, and after it
is gone, a signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any, NoReturn

import torch
from megatron.training.global_vars import get_args, get_signal_handler

from megatron_profit.megatron_patches.callbacks import Callback
from megatron_profit.training.process import interrupts
from megatron_profit.training.process.console import print_rank_0
from megatron_profit.training.process.shutdown import end_communication

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class ExitSignals(Callback):
    """Those that this rank has received.

    Args:
        handled: The signal that Megatron handles (`--exit-signal`).
    """

    def __init__(self, handled: signal.Signals) -> None:
        self._handled = handled
        self._received = 0
        self._pid = os.getpid()
        self._of_megatron: Any = signal.SIG_DFL
        # The time of the first Ctrl-C.
        self._interrupted: float | None = None
        # The phase in which Ctrl-C ends the run at once; None once steps are trained, as the run can then be
        # saved.
        self._outside: str | None = "before the first step"

    def forward(self) -> None:
        """Forward the other signals to the one that Megatron handles.

        An ignored signal stays ignored, as under nohup.
        """
        self._of_megatron = signal.getsignal(self._handled)
        signal.signal(self._handled, self._on_handled)
        for other in FORWARDED:
            if other != self._handled and signal.getsignal(other) is not signal.SIG_IGN:
                signal.signal(other, self._on_signal)
        interrupt = signal.SIGINT
        if interrupt != self._handled and signal.getsignal(interrupt) is not signal.SIG_IGN:
            signal.signal(interrupt, self._on_interrupt)

    def before_training(self, iteration: int) -> None:
        """Let Ctrl-C save a checkpoint from now on."""
        self._outside = None

    @property
    def training_has_begun(self) -> bool:
        """True once the first step may have been made."""
        return self._outside is None

    def release(self) -> None:
        """Let all signals end the process at once again, because there is no step left to save."""
        get_signal_handler().release()
        self._outside = "after the last step"
        for other in FORWARDED:
            if signal.getsignal(other) == self._on_signal:
                signal.signal(other, signal.SIG_DFL)

    def leave(self, end: SystemExit) -> NoReturn:
        """End a run that has left Megatron's loop before its last step. All ranks call this together.

        Raises:
            SystemExit: The code is 128 plus the number of the signal, if there was one, as in a shell. For
                example, 143 for SIGTERM.
        """
        if end.code != 0:
            raise end
        number = self._of_all_ranks()
        if number:
            print_rank_0(_last_words(signal.Signals(number)))
        end_communication()
        raise SystemExit(128 + number if number else 0) from None

    def _on_handled(self, number: int, frame: FrameType | None) -> None:
        self._end_if_interrupted_before()  # torchrun passes the second Ctrl-C on as SIGTERM
        self._of_megatron(number, frame)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a process that reads data, which ends with this one
        self._received = number
        signal.raise_signal(self._handled)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        if self._outside is not None:
            interrupts.end(f"stopped by Ctrl-C {self._outside}")
        self._end_if_interrupted_before()
        if self._interrupted is None:
            self._interrupted = time.monotonic()
            interrupts.say("> Ctrl-C: the run ends after this step; once more ends it at once")
            self._on_signal(number, frame)

    def _end_if_interrupted_before(self) -> None:
        since = self._interrupted
        if since is not None and time.monotonic() - since > interrupts.TOGETHER_SECONDS:
            interrupts.say("megatron-profit-sft: ended by a second Ctrl-C without saving")
            os._exit(interrupts.EXIT_CODE)

    def _of_all_ranks(self) -> int:
        by_rank = get_signal_handler().signals_received()
        number = self._received
        if not number and by_rank[torch.distributed.get_rank()]:
            number = int(self._handled)
        device = "cpu" if torch.distributed.get_backend() == "gloo" else "cuda"
        largest = torch.tensor(number, device=device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return int(largest.item())


def signal_has_come() -> bool:
    """Return whether any rank has received a signal that ends the run. All ranks call this together."""
    return any(get_signal_handler().signals_received())


def _last_words(received: signal.Signals) -> str:
    args = get_args()
    done = f"> stopped by {received.name} after iteration {args.curr_iteration + 1} of {args.train_iters}"
    if args.save is None:
        return f"{done}; nothing was saved, because there is no --save; exit code {128 + received}"
    return (
        f"{done}; checkpoint in {args.save}; the same command, with --load {args.save}, goes on from there; "
        f"exit code {128 + received}"
    )
