"""Steps of a proof: each in processes of its own, within a time limit, its result written as it ends.

The parent imports everything once and never touches the GPU, so that its children are forks, which start
in a fraction of a second. Where a library has touched the GPU in its import, forks cannot use it, and the
children are fresh processes instead.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import benchmarking

_LINES_OF_A_FAILURE = 25


class StepFailure(Exception):
    """A step that did not come to its end; the message is the reason."""


@dataclass
class Result:
    """The outcome of a step.

    Attributes:
        name: Of the step.
        title: For people.
        verdict: "passed", "failed", "measured", or "not run".
        seconds: That the step took, everything included.
        notes: Sentences for people; of a failure, the reason.
        tables: Markdown.
        data: For programs, JSON values.
    """

    name: str
    title: str
    verdict: str = "measured"
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def check(self, fact: str, is_true: bool) -> None:
        """Note a fact that must be true; the step has failed if it is not."""
        self.notes.append(f"{'yes' if is_true else '**no**'}: {fact}")
        if not is_true:
            self.verdict = "failed"
        elif self.verdict == "measured":
            self.verdict = "passed"

    def markdown(self) -> str:
        """Return the result as a section of a page."""
        parts = [f"## {self.title}", f"{self.verdict}, {self.seconds:,.0f} s"]
        if self.notes:
            parts.append("\n".join(f"- {note}" for note in self.notes))
        parts += self.tables
        return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


class Children:
    """Starts functions in processes of their own.

    Args:
        device: "cuda" or "cpu", which each of them makes its own.
        prepare: Called in each process before the function; it imports what all of them need.
        logs: Folder that gets what they print, a file each.
        start_method: "fork" or "spawn".
        deadline: On `time.monotonic`; a process that still runs then is killed.
    """

    def __init__(
        self,
        device: str,
        prepare: Callable[[str], None],
        logs: Path,
        start_method: str = "fork",
        deadline: float = math.inf,
    ) -> None:
        self.device, self.start_method, self.deadline = device, start_method, deadline
        self._prepare, self._logs = prepare, logs
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, seconds: float, function: Callable[..., Any], *values: Any) -> Any:
        """Return what a function returns in a new process.

        Args:
            name: Of the log.
            seconds: After which the process is killed, if the deadline does not come before.
            function: Of a module; what it returns can be pickled.
            *values: Its arguments.

        Raises:
            StepFailure: It raised, exited, died or took too long; the message has the end of its log.
        """
        context: Any = multiprocessing.get_context(self.start_method)
        receiver, sender = context.Pipe(duplex=False)
        log = self._logs / f"{name}.log"
        process = context.Process(
            target=_child, args=(sender, str(log), self._prepare, self.device, function, values)
        )
        seconds = max(0.0, min(seconds, self.deadline - time.monotonic()))
        process.start()
        sender.close()
        if not receiver.poll(seconds):
            _kill(process)
            raise StepFailure(f"cut off after {seconds:.0f} s\n{_end_of(log)}")
        try:
            kind, value = receiver.recv()
        except EOFError:  # it ended without a word
            kind, value = "failed", ""
        process.join(20)
        _kill(process)
        if kind == "failed":
            raise StepFailure(
                f"{value or f'ended with exit code {process.exitcode}'}\n{_end_of(log)}"
            )
        return value


def _child(
    sender: Any,
    log: str,
    prepare: Callable[[str], None],
    device: str,
    function: Callable[..., Any],
    values: Sequence[Any],
) -> None:
    os.setsid()  # so that processes of its own are killed with it
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for target in (1, 2):
        os.dup2(file, target)
    sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
    try:
        prepare(device)
        answer = ("done", function(*values))
    except SystemExit as end:
        answer = ("failed", f"ended with exit code {end.code}")
    except BaseException as error:
        traceback.print_exc()
        answer = ("failed", f"{type(error).__name__}: {error}".splitlines()[0])
    sys.stdout.flush()
    sender.send(answer)
    sender.close()


def _kill(process: Any) -> None:
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not yet made a group of its own
            process.kill()
    process.join()


def _end_of(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-_LINES_OF_A_FAILURE:])


@dataclass(frozen=True)
class Step:
    """One step of a proof.

    Attributes:
        name: For the command line.
        title: For people.
        run: Fills the result; a StepFailure that it raises is the result's reason.
    """

    name: str
    title: str
    run: Callable[[Result], None]


def prove(
    steps: Sequence[Step], deadline: float, write: Callable[[Sequence[Result]], None]
) -> list[Result]:
    """Run steps in their order, and write all results after each.

    Args:
        steps: The steps.
        deadline: On `time.monotonic`; a step that would begin after it is not run.
        write: Called with the results so far.

    Returns:
        The results of all steps.
    """
    results: list[Result] = []
    for step in steps:
        result = Result(step.name, step.title)
        begin = time.monotonic()
        if begin > deadline:
            result.verdict = "not run"
            result.notes.append("the time was used up before it")
        else:
            print(f"> {step.title} …", flush=True)
            _attempt(step, result)
        result.seconds = time.monotonic() - begin
        results.append(result)
        write(results)
        print(f"> {step.title}: {result.verdict}, {result.seconds:,.0f} s", flush=True)
    return results


def _attempt(step: Step, result: Result) -> None:
    try:
        step.run(result)
    except StepFailure as failure:
        result.verdict = "failed"
        reason, _, log = str(failure).partition("\n")
        result.notes.append(f"**{reason}**")
        result.data["log"] = log
        print(log, flush=True)


def write_page(
    out: Path, name: str, results: Sequence[Result], environment: Mapping[str, Any], command: str
) -> Path:
    """Write the results so far as `<date>-<name>.json` and `.md`; return the latter's path."""
    steps = [
        {
            "name": result.name,
            "verdict": result.verdict,
            "seconds": round(result.seconds, 1),
            "notes": result.notes,
            **result.data,
        }
        for result in results
    ]
    record = {"environment": dict(environment), "command": command, "steps": steps}
    body = "\n".join(result.markdown() for result in results)
    return benchmarking.write_results(out, name, record, "A proof on a GPU", body)
