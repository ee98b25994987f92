"""Carries out the runs of a comparison: train, export, evaluate; results are kept, so it can go on later."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import Queue, SimpleQueue
from typing import Any
from zlib import crc32

from checkpoint_conversion.engine.output import remove_folder, whole_file
from megatron_profit.evaluation.comparison.commands import (
    execute,
    seconds_of,
    stoppable,
    take_gpus,
)
from megatron_profit.evaluation.comparison.plan import TRAINED, Plan, Run, Unit, folder_name
from megatron_profit.evaluation.errors import EvaluationError

RESULT = "result.json"
TOKENS = "supervised tokens"
# Metrics whose values over the steps are kept.
CURVES = ("kept fraction", "mean p kept", "mean q kept", "lm loss", "threshold", TOKENS)

type ReadCurves = Callable[[Path], Mapping[str, tuple[Sequence[int], Sequence[float]]]]
type Publish = Callable[[Sequence[Outcome], int, int], None]


@dataclass(frozen=True)
class Outcome:
    """The result of one run, or of the base.

    Attributes:
        run: The run; None for the base.
        data: Name of the data set whose tasks were asked.
        scores: Task (or named evaluation) -> avg@k.
        metrics: Last values of the training's metrics file.
        right: As `scores`, but for each question the share of its samples that is right.
        curves: Metric -> its value at each step of the training.
        seconds: "train" and each evaluation -> CPU seconds and seconds.
        unfinished: As `scores`, the share of answers that the length limit cut.
    """

    run: Run | None
    data: str
    scores: Mapping[str, float]
    metrics: Mapping[str, float]
    right: Mapping[str, Sequence[float]] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    unfinished: Mapping[str, float] = field(default_factory=dict)

    @property
    def setting(self) -> str | None:
        """The run's setting; None for the base."""
        return None if self.run is None else self.run.setting

    def with_more(self, other: Outcome) -> Outcome:
        """Return this outcome with another one's values added."""
        names = ("scores", "metrics", "right", "curves", "seconds", "unfinished")
        return Outcome(
            self.run, self.data, **{n: {**getattr(self, n), **getattr(other, n)} for n in names}
        )


def carry_out(
    plan: Plan,
    out: Path,
    read_curves: ReadCurves,
    show: Callable[[str], None],
    publish: Publish,
    gpus: Sequence[str] = (),
) -> list[Outcome]:
    """Carry out all stages, `plan.jobs` runs at a time; finished parts are read.

    While the first runs of a stage are made, one more job evaluates the base. Each part is published when it
    is finished, also if an earlier one takes longer.

    Args:
        plan: The comparison.
        out: Folder of everything that is written.
        read_curves: Returns the curves of a metrics file.
        show: Receives a line for each finished part: a run with its evaluations in one stage.
        publish: Receives the outcomes so far in the plan's order, the number of finished parts and of all,
            after each of them.
        gpus: The visible GPUs, as CUDA_VISIBLE_DEVICES names them. Several jobs get some each.

    Raises:
        EvaluationError: There are too few GPUs, a command failed or was stopped, or a kept result is damaged.
    """
    stages = plan.schedule()
    keys = list(dict.fromkeys(_keys(stages)))
    total, done, spent, start = sum(map(len, stages)), 0, 0.0, time.monotonic()
    found: dict[tuple[str, Run | None], Outcome] = {}

    def add(outcome: Outcome) -> None:
        key = (outcome.data, outcome.run)
        found[key] = found[key].with_more(outcome) if key in found else outcome
        publish(in_order(), done, total)

    def in_order() -> list[Outcome]:
        return [found[key] for key in keys if key in found]

    shares = shares_of_gpus(plan, gpus)
    with (
        stoppable(),
        ThreadPoolExecutor(plan.jobs, "", take_gpus, (shares,)) as pool,
        _Jobs(pool) as jobs,
    ):
        for units in stages:
            jobs.begin(_of_base, plan, out, evaluations_of(units))
            for unit in units:
                jobs.begin(_of_unit, plan, out, read_curves, unit)
            for outcome in (each for _ in range(1 + len(units)) for each in jobs.next()):
                if outcome.run is None:
                    add(outcome)
                    continue
                done += 1
                spent += _seconds_of(outcome, found.get((outcome.data, outcome.run)))
                add(outcome)
                left = spent / done * (total - done) / plan.jobs
                show(_line(outcome, done, total, time.monotonic() - start, left))
    return in_order()


class _Jobs:
    """Jobs of a pool, whose outcomes come in the order in which the jobs end.

    After a failure, and after the `with` block, the jobs that have not begun end at once. So the error is
    shown as soon as the jobs that run have ended.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._ended: SimpleQueue[list[Outcome] | BaseException] = SimpleQueue()
        self._is_over = threading.Event()

    def __enter__(self) -> _Jobs:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()

    def begin[**P](
        self, job: Callable[P, list[Outcome]], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Give a job to the pool."""

        def do() -> None:
            try:
                if not self._is_over.is_set():
                    self._ended.put(job(*args, **kwargs))
            except BaseException as error:
                self._is_over.set()
                self._ended.put(error)

        self._pool.submit(do)

    def next(self) -> list[Outcome]:
        """Wait for the next job that ends, and return its outcomes; raises its error."""
        ended = self._ended.get()
        if isinstance(ended, BaseException):
            raise ended
        return ended


def _keys(stages: Sequence[Sequence[Unit]]) -> Iterator[tuple[str, Run | None]]:
    """Yield data set and run (None: the base) of each outcome, in the order of the plan."""
    for units in stages:
        yield from ((data, None) for data in evaluations_of(units))
        yield from ((unit.run.data, unit.run) for unit in units)


def shares_of_gpus(plan: Plan, gpus: Sequence[str]) -> Queue[str | None]:
    """Return a value of CUDA_VISIBLE_DEVICES for each job; None where it sees all, or there is no GPU.

    Raises:
        EvaluationError: The trainings at a time have more processes than there are GPUs.
    """
    shares: Queue[str | None] = Queue()
    each, needed = plan.processes, plan.jobs * plan.processes
    if plan.jobs > 1 and 0 < len(gpus) < needed:
        raise EvaluationError(
            f"{plan.jobs} jobs of {each} processes need {needed} GPUs, and {len(gpus)} are visible; lower "
            "jobs or processes, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    for first in range(0, needed, each):
        shared = plan.jobs > 1 and gpus
        shares.put(",".join(gpus[first : first + each]) if shared else None)
    return shares


def evaluations_of(units: Sequence[Unit]) -> dict[str, list[str]]:
    """Return data set -> the evaluations of its units."""
    found: dict[str, dict[str, None]] = {}
    for unit in units:
        found.setdefault(unit.run.data, {}).update(dict.fromkeys(unit.evaluations))
    return {data: list(names) for data, names in found.items()}


def _seconds_of(outcome: Outcome, earlier: Outcome | None) -> float:
    """Return the seconds that a part took, also before an interruption; its training may be earlier."""
    known = {} if earlier is None else earlier.seconds
    return sum(seconds for name, (_, seconds) in outcome.seconds.items() if name not in known)


def _line(outcome: Outcome, done: int, total: int, seconds: float, left: float) -> str:
    run = outcome.run
    assert run is not None
    scores = ", ".join(f"{task} {100 * score:.1f} %" for task, score in outcome.scores.items())
    return (
        f"{done} of {total} parts, {seconds / 60:.1f} min so far, {left / 60:.1f} min left: {run.data}, "
        f"{run.setting}, seed {run.seed}: {scores}"
    )


def _of_base(plan: Plan, out: Path, evaluations: Mapping[str, Sequence[str]]) -> list[Outcome]:
    """Return the base's outcome for each data set; one after another, since data sets share answers."""
    outcomes = []
    for data, names in evaluations.items():
        outcome = Outcome(None, data, {}, {})
        for name in names:
            label = folder_name("base", name or "evaluation", _digest(plan, data, name))
            outcome = outcome.with_more(
                _evaluated(plan, None, data, name, plan.base, out / "runs" / label)
            )
        outcomes.append(outcome)
    return outcomes


def _digest(plan: Plan, data: str, evaluation: str, model: Path | None = None) -> str:
    command = plan.evaluate_command(data, evaluation, model or plan.base, Path("out"))
    return plan.digest(command)


def _of_unit(plan: Plan, out: Path, read_curves: ReadCurves, unit: Unit) -> list[Outcome]:
    """Return the outcome of a run with its evaluations in one stage, as the only one."""
    run = unit.run
    command = plan.train_command(run, TRAINED, Path("metrics"))
    folder = out / "runs" / folder_name(run.data, run.setting, run.seed, plan.digest(command))
    model = folder / "hf"
    places = {
        name: folder / folder_name(name or "evaluation", _digest(plan, run.data, name, TRAINED))
        for name in unit.evaluations
    }
    to_ask = [name for name, place in places.items() if not (place / RESULT).exists()]
    if to_ask and not model.is_dir():
        (folder / RESULT).unlink(missing_ok=True)
    outcome = _kept(folder / RESULT, lambda: _trained(plan, run, folder, read_curves))
    for name, place in places.items():
        outcome = outcome.with_more(_evaluated(plan, run, run.data, name, model, place))
    if unit.is_last and not plan.keep_models:
        remove_folder(model)
    return [outcome]


def _trained(plan: Plan, run: Run, folder: Path, read_curves: ReadCurves) -> Outcome:
    """Train a run, or go on with its training, and export it."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    # Left from an interruption just after the export.
    remove_folder(folder / "hf")
    if not plan.save_interval:
        metrics.unlink(missing_ok=True)
    log = folder / "train.log"
    command = plan.train_command(run, folder / "hf", metrics, checkpoints)
    execute(command, log, _threads(plan.jobs * plan.processes))
    remove_folder(checkpoints)
    curves = {name: values for name, (_, values) in read_curves(metrics).items()}
    return Outcome(
        run,
        run.data,
        {},
        {name: values[-1] for name, values in curves.items()},
        curves={n: [float(f"{v:.5g}") for v in curves[n]] for n in CURVES if n in curves},
        seconds={"train": seconds_of(log)},
    )


def _threads(processes: int) -> int:
    """Return the threads of each of several processes that share this machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _evaluated(
    plan: Plan, run: Run | None, data: str, evaluation: str, model: Path, folder: Path
) -> Outcome:
    """Ask a model what has no answer yet; the answers of an interrupted evaluation are kept."""

    def make() -> Outcome:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "evaluate.log"
        command = plan.evaluate_command(data, evaluation, model, folder)
        execute(command, log, _threads(plan.jobs))
        results = json.loads((folder / "results.json").read_text())["results"]
        names = {
            result["task"]: ": ".join(filter(None, (evaluation, result["task"])))
            if len(results) > 1 or not evaluation
            else evaluation
            for result in results
        }
        return Outcome(
            run,
            data,
            {names[result["task"]]: result["average"]["value"] for result in results},
            {},
            right={names[task]: shares_right(folder, task) for task in names},
            seconds={evaluation or "evaluate": seconds_of(log)},
            unfinished={names[result["task"]]: result["unfinished"] for result in results},
        )

    # The base's answers serve every data set that asks the same.
    return replace(_kept(folder / RESULT, make), run=run, data=data)


def shares_right(folder: Path, task: str) -> list[float]:
    """Return for each question, in order, the share of its samples that is right."""
    from megatron_profit.evaluation.records import read_records_file
    from megatron_profit.evaluation.run import records_file

    _, samples = read_records_file(records_file(folder, "model", task))
    return [
        sum(sample.right for sample in of_question.values()) / len(of_question)
        for _, of_question in sorted(samples.items())
    ]


def _kept(file: Path, make: Callable[[], Outcome]) -> Outcome:
    if file.exists():
        return read_outcome(file)
    outcome = make()
    write_outcome(file, outcome)
    return outcome


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
        return outcome_of(json.loads(kept["result"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{file} is damaged ({error}); remove it, and its run is made again"
        ) from error


def results_text(outcomes: Sequence[Outcome], plan: str, finished: int, runs: int) -> str:
    """Return the text of results.json: plan, number of finished parts and of all, outcomes."""
    head = json.dumps({"plan": plan, "finished": finished, "runs": runs})
    # A line for each result.
    lines = ",\n".join(json.dumps(asdict(outcome)) for outcome in outcomes)
    return f'{head[:-1]}, "results": [\n{lines}\n]}}\n'


def outcome_of(values: Mapping[str, Any]) -> Outcome:
    """Return the outcome of a JSON object, as results.json holds them.

    Raises:
        TypeError: It has other keys.
    """
    run = Run(**values["run"]) if values["run"] else None
    return Outcome(**{**values, "run": run})
