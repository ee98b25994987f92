"""Training runs that are meant to be killed, and what their logs and checkpoints say afterwards."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import forked_torchrun
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

METRICS = ("objective", "lm loss", "kept fraction", "grad norm", "learning rate")


class Job:
    """A run of the training entry under torchrun, in the background.

    Args:
        world_size: Ranks.
        flags: Of the entry.
        log: Gets what it prints.
        max_restarts: Of torchrun.
    """

    def __init__(
        self, world_size: int, flags: list[object], log: Path, max_restarts: int = 0
    ) -> None:
        self.log = log
        log.touch()
        entry = ["--device", "cpu", *map(str, flags)]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        self._torchrun = forked_torchrun.context().Process(
            target=forked_torchrun.launch, args=(world_size, entry, log, max_restarts, env)
        )
        self._torchrun.start()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def ranks(self) -> list[int]:
        """Process ids."""
        pid = self._torchrun.pid
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]

    def wait_for(self, condition: Callable[[str], object], timeout: float = 600) -> None:
        """Until the output fulfils a condition."""
        end = time.monotonic() + timeout
        while not condition(self.output):
            assert self._torchrun.is_alive(), f"ended too soon:\n{self.output[-6000:]}"
            assert time.monotonic() < end, f"waited too long:\n{self.output[-6000:]}"
            time.sleep(0.005)

    def end(self, timeout: float = 600) -> int:
        """Wait for the end; the exit code."""
        self._torchrun.join(timeout)
        assert not self._torchrun.is_alive(), f"does not end:\n{self.output[-6000:]}"
        return self._torchrun.exitcode

    def kill(self, what: str) -> None:
        """End it with no warning: "torchrun", a "rank", or the "machine" with all its processes."""
        ranks, torchrun = self.ranks, self._torchrun.pid
        victims = {"torchrun": [torchrun], "rank": ranks[-1:], "machine": [torchrun, *ranks]}
        for pid in victims[what]:
            os.kill(pid, signal.SIGKILL)
        self.end()
        deadline = time.monotonic() + 60
        while any(_command(pid) for pid in ranks):
            assert time.monotonic() < deadline, "ranks outlive their launcher"
            time.sleep(0.01)

    def kill_rank(self) -> None:
        """Kill one rank and leave the rest to torchrun."""
        os.kill(self.ranks[-1], signal.SIGKILL)

    def send(self, number: signal.Signals, to: str) -> None:
        """Send a signal to "torchrun" or to the first "rank" alone."""
        os.kill(self._torchrun.pid if to == "torchrun" else self.ranks[0], number)


def _command(pid: int) -> bytes:
    """The command line of a process; nothing of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def steps(output: str) -> dict[int, dict[str, str]]:
    """The metrics of each step, as printed."""
    lines = re.findall(r"iteration +(\d+)/ *\d+ (\|.*)", output)
    return {
        int(number): {
            name: found[1]
            for name in METRICS
            if (found := re.search(rf"\| {name}: (\S+) \|", line))
        }
        for number, line in lines
    }


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, those of the optimizer included."""
    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    content = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(content, checkpoint_id=checkpoint, no_dist=True)
    return content


def assert_same_tensors(one: Path, other: Path) -> None:
    """Bit for bit."""
    here, there = tensors(one), tensors(other)
    assert here.keys() == there.keys()
    different = [name for name, values in here.items() if not torch.equal(values, there[name])]
    assert not different, different


@dataclass
class Chain:
    """A run that is killed again and again, and started again with the same command.

    Attributes:
        lost: Steps that each kill has lost, those after the checkpoint that was resumed from.
        inside_saves: Kills between the beginning and the end of a save.
        seconds: That each life has taken.
    """

    start: Callable[[Path], Job]
    save: Path
    logs: Path
    lost: list[int] = field(default_factory=list)
    inside_saves: int = 0
    seconds: list[float] = field(default_factory=list)
    seen: dict[int, dict[str, str]] = field(default_factory=dict)
    _lives: int = 0
    _last: int = 0

    def live(self, expected: dict[int, dict[str, str]], end: Callable[[Job], object]) -> str:
        """Start, let `end` do what ends the run, and compare what was trained meanwhile."""
        begun = time.monotonic()
        job = self.start(self.logs / f"life_{self._lives}.log")
        self._lives += 1
        end(job)
        trained = steps(job.output)
        for number, metrics in trained.items():
            assert metrics == expected[number], f"step {number}, in {job.log}"
        if trained:
            if self._last:
                self.lost.append(max(self._last - (min(trained) - 1), 0))
            self.seen |= trained
            self._last = max(trained)
        self.seconds.append(time.monotonic() - begun)
        self.inside_saves += ended_in_save(job.output)
        return job.output


def ended_in_save(output: str) -> bool:
    """Whether a save was begun and not completed."""
    return output.rfind("saving checkpoint at") > output.rfind("successfully saved checkpoint")


def is_half_written(save: Path) -> bool:
    """Whether the newest folder is a checkpoint that was begun and not completed."""
    newest = max(save.glob("iter_*"), default=None)
    return newest is not None and not (newest / "metadata.json").exists()


def killed_at_step(number: int, what: str, delay: float) -> Callable[[Job], None]:
    """Kills when a step has been logged, and `delay` seconds have passed."""

    def end(job: Job) -> None:
        job.wait_for(lambda output: max(steps(output), default=0) >= number)
        time.sleep(delay)
        job.kill(what)

    return end


def killed_in_save(number: int, what: str, delay: float) -> Callable[[Job], None]:
    """Kills when a save at or after a step has begun, and `delay` seconds have passed."""

    def begun(output: str) -> bool:
        return any(
            int(n) >= number for n in re.findall(r"saving checkpoint at iteration +(\d+)", output)
        )

    def end(job: Job) -> None:
        job.wait_for(begun)
        time.sleep(delay)
        job.kill(what)

    return end


def random_kills(count: int, steps_in_all: int, seed: int) -> list[Callable[[Job], None]]:
    """Kills at random moments of a run, in their order; half of them aim at saves."""
    draw = random.Random(seed)
    moments = sorted(draw.randint(1, steps_in_all - 4) for _ in range(count))
    whats = [draw.choice(("torchrun", "rank", "machine")) for _ in moments]
    return [
        killed_in_save(moment, what, draw.uniform(0, 0.15))
        if draw.random() < 0.5
        else killed_at_step(moment, what, draw.uniform(0, 0.3))
        for moment, what in zip(moments, whats, strict=True)
    ]
