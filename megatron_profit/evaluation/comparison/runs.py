"""Carries out the runs of a comparison: train, export, evaluate; results are kept, so it can go on later."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from checkpoint_conversion.engine.output import whole_file
from megatron_profit.evaluation.comparison.plan import Plan, Run, folder_name
from megatron_profit.evaluation.errors import EvaluationError

RESULT = "result.json"
_TAIL_LINES = 15


@dataclass(frozen=True)
class Outcome:
    """The result of one run, or of the base.

    Attributes:
        run: The run; None for the base.
        data: Name of the data set whose tasks were asked.
        scores: Task -> avg@k.
        metrics: Last values of the training's metrics file.
    """

    run: Run | None
    data: str
    scores: Mapping[str, float]
    metrics: Mapping[str, float]


def carry_out(
    plan: Plan,
    out: Path,
    read_metrics: Callable[[Path], dict[str, float]],
    show: Callable[[str], None],
) -> list[Outcome]:
    """Evaluate the base and carry out all runs, `plan.jobs` at a time; finished ones are read.

    Args:
        plan: The comparison.
        out: Folder of everything that is written.
        read_metrics: Returns the last values of a metrics file.
        show: Receives a line for each finished run.

    Raises:
        EvaluationError: A command failed, or a kept result is damaged.
    """
    runs = list(plan.runs())
    start = time.monotonic()
    bases = [_base(plan, data, out) for data in plan.data]
    done = 0

    def one(run: Run) -> Outcome:
        nonlocal done
        outcome = _of_run(plan, run, out, read_metrics)
        done += 1
        minutes = (time.monotonic() - start) / 60
        left = minutes / done * (len(runs) - done)
        scores = ", ".join(f"{task} {100 * score:.1f} %" for task, score in outcome.scores.items())
        show(
            f"{done} of {len(runs)} runs, {minutes:.1f} min so far, {left:.1f} min left: {run.data}, "
            f"{run.setting}, seed {run.seed}: {scores}"
        )
        return outcome

    with ThreadPoolExecutor(plan.jobs) as pool:
        return [*bases, *pool.map(one, runs)]


def _base(plan: Plan, data: str, out: Path) -> Outcome:
    command = plan.evaluate_command(data, plan.base, Path("out"))
    folder = out / "runs" / folder_name("base", data, plan.digest(command))
    return _kept(folder, lambda: Outcome(None, data, _evaluated(plan, data, plan.base, folder), {}))


def _of_run(
    plan: Plan, run: Run, out: Path, read_metrics: Callable[[Path], dict[str, float]]
) -> Outcome:
    commands = [
        *plan.train_command(run, Path("hf"), Path("metrics")),
        *plan.evaluate_command(run.data, Path("hf"), Path("out")),
    ]
    name = folder_name(run.data, run.setting, run.seed, plan.digest(commands))
    folder = out / "runs" / name

    def make() -> Outcome:
        metrics = folder / "metrics.jsonl"
        execute(plan.train_command(run, folder / "hf", metrics), folder / "train.log")
        scores = _evaluated(plan, run.data, folder / "hf", folder)
        if not plan.keep_models:
            shutil.rmtree(folder / "hf")
        return Outcome(run, run.data, scores, read_metrics(metrics))

    return _kept(folder, make)


def _kept(folder: Path, make: Callable[[], Outcome]) -> Outcome:
    file = folder / RESULT
    if file.exists():
        return read_outcome(file)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outcome = make()
    write_outcome(file, outcome)
    return outcome


def _evaluated(plan: Plan, data: str, model: Path, folder: Path) -> dict[str, float]:
    out = folder / "evaluation"
    execute(plan.evaluate_command(data, model, out), folder / "evaluate.log")
    results = json.loads((out / "results.json").read_text())["results"]
    return {result["task"]: result["average"]["value"] for result in results}


def execute(command: Sequence[str], log: Path) -> None:
    """Run a command, whose output goes to a file.

    Raises:
        EvaluationError: The command failed.
    """
    with log.open("w", encoding="utf-8") as file:
        # Several trainings may share the cores.
        env = {"OMP_NUM_THREADS": "1", **os.environ}
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env).returncode
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = " / ".join([line for line in lines if "error: " in line] or lines[-_TAIL_LINES:])
        raise EvaluationError(f"{shlex.join(command)} failed ({log}): {tail}")


def write_outcome(file: Path, outcome: Outcome) -> None:
    """Write an outcome to a file, with a checksum."""
    values = json.dumps(asdict(outcome))
    content = {"crc32": f"{crc32(values.encode()):08x}", "result": values}
    with whole_file(file) as stream:
        stream.write(json.dumps(content).encode())


def read_outcome(file: Path) -> Outcome:
    """Read an outcome that was kept.

    Raises:
        EvaluationError: The file was changed since it was written.
    """
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["crc32"] != f"{crc32(kept['result'].encode()):08x}":
            raise ValueError("its checksum differs")
        values: dict[str, Any] = json.loads(kept["result"])
        run = Run(**values.pop("run")) if values["run"] else values.pop("run")
        return Outcome(run, **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{file} is damaged ({error}); remove it, and its run is made again"
        ) from error
