"""The plan of a comparison, from one YAML file: which runs there are, and the commands of each."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_profit.evaluation.errors import EvaluationError

ALL_WEIGHTS = 0
_REQUIRED = ("base", "train", "evaluate", "objectives")


@dataclass(frozen=True)
class Run:
    """One training: a choice of everything that the plan varies.

    Attributes:
        data, objective: Names in the plan.
        learning_rate: As in the plan; None where the flags of the objective or of all runs set it.
        lora_rank: Rank of the adapters; 0 for all weights.
        seed: Seed of the training.
    """

    data: str
    objective: str
    learning_rate: float | None
    lora_rank: int
    seed: int

    @property
    def setting(self) -> str:
        """Everything but data and seed, for tables. For example, "dft, lr 1e-05, rank 16"."""
        rate = "" if self.learning_rate is None else f", lr {self.learning_rate:g}"
        rank = f", rank {self.lora_rank}" if self.lora_rank else ""
        return f"{self.objective}{rate}{rank}"

    @property
    def without_rank(self) -> Run:
        """The same choices for all weights."""
        return replace(self, lora_rank=ALL_WEIGHTS)


@dataclass(frozen=True)
class Plan:
    """A comparison; the fields are the keys of its YAML file.

    Attributes:
        base: HuggingFace folder that all runs start from.
        train: Training flags of all runs.
        evaluate: Flags of `megatron-profit evaluate` for all models.
        objectives: Name -> training flags.
        data: Name -> training flags (`train`) and evaluation flags (`evaluate`) of a data set.
        learning_rates: Values of --lr; empty if the flags set it.
        lora_ranks: Values of --lora-rank; 0 trains all weights.
        seeds: Values of --seed.
        processes: Processes of one training.
        jobs: Trainings at a time.
        keep_models: Whether the exported models stay.
    """

    base: Path
    train: str
    evaluate: str
    objectives: Mapping[str, str]
    data: Mapping[str, Mapping[str, str]]
    learning_rates: Sequence[float] = ()
    lora_ranks: Sequence[int] = (ALL_WEIGHTS,)
    seeds: Sequence[int] = (1, 2, 3)
    processes: int = 1
    jobs: int = 1
    keep_models: bool = False

    def runs(self) -> Iterator[Run]:
        """Yield all runs; a seed is complete before the next one begins."""
        rates = self.learning_rates or (None,)
        axes = (self.seeds, self.data, self.objectives, rates, self.lora_ranks)
        for seed, data, objective, rate, rank in itertools.product(*axes):
            yield Run(data, objective, rate, rank, seed)

    def train_command(self, run: Run, export: Path, metrics: Path) -> list[str]:
        """Return the command that trains a run and exports its last weights."""
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
        return [
            sys.executable,
            *((*torchrun, str(self.processes)) if self.processes > 1 else ()),
            *("-m", "megatron_profit.sft", "--hf-model", str(self.base)),
            *shlex.split(self.train),
            *shlex.split(self.data[run.data].get("train", "")),
            *shlex.split(self.objectives[run.objective]),
            *(("--lr", f"{run.learning_rate:g}") if run.learning_rate is not None else ()),
            *(("--lora-rank", str(run.lora_rank)) if run.lora_rank else ()),
            *("--seed", str(run.seed), "--export-hf", str(export), "--metrics-file", str(metrics)),
        ]

    def evaluate_command(self, data: str, model: Path, out: Path) -> list[str]:
        """Return the command that evaluates a model on the tasks of a data set."""
        return [
            *(sys.executable, "-m", "megatron_profit", "evaluate", f"model={model}"),
            *shlex.split(self.evaluate),
            *shlex.split(self.data[data].get("evaluate", "")),
            *("--out", str(out)),
        ]

    def digest(self, command: Sequence[str]) -> str:
        """Return a fingerprint of a command and of the files that it names, the base's included."""
        parts = list(command)
        for file in sorted(_inputs(command)):
            entries = sorted(file.iterdir()) if file.is_dir() else [file]
            # Weights may be large: size and time must suffice.
            parts += [f"{e} {e.stat().st_size} {e.stat().st_mtime_ns}" for e in entries]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _inputs(command: Sequence[str]) -> set[Path]:
    """Return the files and folders that a command names, also as NAME=PLACE, without the program.

    The module after `-m` is none, although a checkout has a folder of its name.
    """
    named = [part for before, part in pairwise(command) if before != "-m"]
    places = {part.partition("=")[2] if "=" in part else part for part in named}
    return {Path(place) for place in places if place and os.path.exists(place)}


def folder_name(*parts: object) -> str:
    """Return a name of a folder. For example, ("profit 0.1", 3) gives "profit_0_1-3"."""
    return "-".join(re.sub(r"\W+", "_", str(part)) for part in parts)


def read_plan(file: Path) -> Plan:
    """Read a plan.

    Raises:
        EvaluationError: The file cannot be read, a key is unknown or missing, or a value does not fit.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise EvaluationError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise EvaluationError(f"{file}: must be a YAML mapping with {', '.join(_REQUIRED)}")
    known = [each.name for each in fields(Plan)]
    for name in content:
        if name not in known:
            raise EvaluationError(f"{file}: unknown key {name!r}; the keys are {', '.join(known)}")
    if missing := [name for name in _REQUIRED if name not in content]:
        raise EvaluationError(f"{file}: {' and '.join(missing)} must be given")
    return _plan(file, {"data": {"data": {}}} | content)


def _plan(file: Path, content: Mapping[str, Any]) -> Plan:
    check = _Checks(file)
    values: dict[str, Any] = dict(content)
    values["base"] = Path(check.of(content, "base", str)).absolute()
    if not values["base"].is_dir():
        raise EvaluationError(f"{file}: base: {values['base']} is no folder")
    for name in ("train", "evaluate"):
        check.flags(name, content[name])
    for name, flags in check.of(content, "objectives", dict).items():
        check.flags(f"objectives: {name}", flags)
    for name, parts in check.of(content, "data", dict).items():
        if not isinstance(parts, dict) or not set(parts) <= {"train", "evaluate"}:
            raise EvaluationError(f"{file}: data: {name} must hold train and evaluate, both flags")
        for part, flags in parts.items():
            check.flags(f"data: {name}: {part}", flags)
    # YAML reads 1e-5 as text.
    values["learning_rates"] = tuple(check.numbers(content, "learning_rates", float))
    if not values["learning_rates"]:
        del values["learning_rates"]
    for name in ("lora_ranks", "seeds"):
        if name in content:
            values[name] = tuple(check.numbers(content, name, int))
    for name in ("processes", "jobs"):
        if not isinstance(content.get(name, 1), int) or content.get(name, 1) < 1:
            raise EvaluationError(f"{file}: {name} is {content[name]!r}; it must be at least 1")
    return Plan(**values)


class _Checks:
    """Checks of a plan's values, whose errors name the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def of(self, content: Mapping[str, Any], name: str, kind: type) -> Any:
        """Return a value that must have a type and not be empty."""
        value = content[name]
        if not isinstance(value, kind) or not value:
            words = "text" if kind is str else "a mapping from names"
            raise EvaluationError(f"{self.file}: {name} is {value!r}; it must be {words}")
        return value

    def flags(self, name: str, value: Any) -> None:
        """Check a text of flags that a shell could read."""
        try:
            shlex.split(value)
        except (ValueError, AttributeError, TypeError) as error:
            raise EvaluationError(
                f"{self.file}: {name} is {value!r}; it must be a text of flags ({error})"
            ) from error

    def numbers(self, content: Mapping[str, Any], name: str, kind: type) -> list[Any]:
        """Return the different numbers of a list."""
        values = content.get(name, [])
        try:
            found = [kind(value) for value in values]
        except (TypeError, ValueError):
            found = []
        wrong = any(isinstance(value, bool) or value < 0 for value in found)
        if wrong or len(set(found)) < len(values) or (name in content and not found):
            raise EvaluationError(
                f"{self.file}: {name} is {values!r}; it must be a list of different numbers"
            )
        return found
