"""The plan of a comparison, from one YAML file: which runs there are, and the commands of each."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_profit.data.errors import DataError
from megatron_profit.data.files.sources import places_of_entries
from megatron_profit.data.files.splits import is_dataset
from megatron_profit.evaluation.command_line import DATA
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.flags import number_text

ALL_WEIGHTS = 0
# The one evaluation of a plan that does not name several.
UNNAMED = ""
_REQUIRED = ("base", "train", "evaluate", "objectives")
# Weights may be large.
_EDGE_BYTES = 1 << 23
_NAMED_AXES = ("data", "objectives", "evaluate")
# Words whose value is no input of a command: the program's module, and places that a run writes to.
_NO_INPUTS = (
    *("-m", "--out", "--export-hf", "--export-adapter", "--metrics-file", "--save", "--ref-cache"),
    *("--data-cache", "--tensorboard-dir", "--token-report", "--wandb-save-dir"),
)
_SET_HERE = "drop it; the comparison sets it"
# Flags of evaluations that a plan cannot have, with the remedy.
_OF_EVALUATIONS = {
    "--out": _SET_HERE,
    "--server": "drop it; a server does not have the trained weights",
    "--opencompass": "drop it; it asks no question",
}
# Where a fingerprint's command names what the run itself has written.
TRAINED, CHECKPOINTS = Path("hf"), Path("checkpoints")
_PLACEHOLDERS = {("--load", str(CHECKPOINTS)), ("model", str(TRAINED))}


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
        rate = "" if self.learning_rate is None else f", lr {number_text(self.learning_rate)}"
        rank = f", rank {self.lora_rank}" if self.lora_rank else ""
        return f"{self.objective}{rate}{rank}"

    @property
    def without_rank(self) -> Run:
        """The same choices for all weights."""
        return replace(self, lora_rank=ALL_WEIGHTS)


@dataclass(frozen=True)
class Unit:
    """A run with evaluations that are made together.

    Attributes:
        run: The training.
        evaluations: Names of the plan's evaluations.
        is_last: Whether no later stage asks the run's model.
    """

    run: Run
    evaluations: tuple[str, ...]
    is_last: bool = True


@dataclass(frozen=True)
class Plan:
    """A comparison; the fields are the keys of its YAML file, besides `text`.

    Attributes:
        base: HuggingFace folder that all runs start from.
        train: Training flags of all runs.
        evaluate: Name -> flags of `megatron-profit evaluate` for all models. The file may hold one text.
        objectives: Name -> training flags.
        data: Name -> training flags (`train`) and evaluation flags (`evaluate`) of a data set.
        learning_rates: Values of --lr; empty if the flags set it.
        lora_ranks: Values of --lora-rank; 0 trains all weights.
        seeds: Values of --seed.
        stages: Parts of the comparison in the order in which they are made. Each narrows some of `data`,
            `objectives`, `learning_rates`, `lora_ranks`, `seeds` and `evaluate`; empty for one stage of all.
        processes: Processes of one training.
        jobs: Trainings at a time.
        keep_models: Whether the exported models stay when no later stage asks them.
        save_interval: Steps between a training's checkpoints, from which it goes on after an interruption; 0
            for none.
        text: The file's content.
    """

    base: Path
    train: str
    evaluate: Mapping[str, str]
    objectives: Mapping[str, str]
    data: Mapping[str, Mapping[str, str]]
    learning_rates: Sequence[float] = ()
    lora_ranks: Sequence[int] = (ALL_WEIGHTS,)
    seeds: Sequence[int] = (1, 2, 3)
    stages: Sequence[Mapping[str, Sequence[Any]]] = ()
    processes: int = 1
    jobs: int = 1
    keep_models: bool = False
    save_interval: int = 0
    text: str = ""

    def runs(self) -> list[Run]:
        """Return all runs, each once, in the order in which they are made."""
        return list(dict.fromkeys(unit.run for units in self.schedule() for unit in units))

    def schedule(self) -> list[list[Unit]]:
        """Return the units of each stage, in order; an evaluation of a run belongs to its first stage."""
        asked: dict[Run, set[str]] = {}
        stages = []
        for stage in self.stages or ({},):
            units = []
            for run in self._runs_of(stage):
                known = asked.setdefault(run, set())
                names = tuple(e for e in stage.get("evaluate", self.evaluate) if e not in known)
                known.update(names)
                if names:
                    units.append(Unit(run, names))
            stages.append(units)
        last = {unit.run: place for place, units in enumerate(stages) for unit in units}
        return [
            [replace(unit, is_last=last[unit.run] == place) for unit in units]
            for place, units in enumerate(stages)
        ]

    def _runs_of(self, stage: Mapping[str, Sequence[Any]]) -> Iterator[Run]:
        """Yield the runs of a stage; a seed is complete before the next one begins."""
        names = ("seeds", "data", "objectives", "learning_rates", "lora_ranks")
        axes = [stage.get(name, getattr(self, name)) or (None,) for name in names]
        for seed, data, objective, rate, rank in itertools.product(*axes):
            yield Run(data, objective, rate, rank, seed)

    def train_command(
        self, run: Run, export: Path, metrics: Path, checkpoints: Path = CHECKPOINTS
    ) -> list[str]:
        """Return the command that trains a run, or goes on with it, and exports its last weights."""
        interval = str(self.save_interval)
        places = ("--save", str(checkpoints), "--load", str(checkpoints))
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
        return [
            sys.executable,
            *((*torchrun, str(self.processes)) if self.processes > 1 else ()),
            *("-m", "megatron_profit.sft", "--hf-model", str(self.base)),
            *shlex.split(self.train),
            *shlex.split(self.data[run.data].get("train", "")),
            *shlex.split(self.objectives[run.objective]),
            *(("--lr", number_text(run.learning_rate)) if run.learning_rate is not None else ()),
            *(("--lora-rank", str(run.lora_rank)) if run.lora_rank else ()),
            *((*places, "--save-interval", interval) if self.save_interval else ()),
            *("--seed", str(run.seed), "--export-hf", str(export), "--metrics-file", str(metrics)),
        ]

    def evaluate_command(self, data: str, evaluation: str, model: Path, out: Path) -> list[str]:
        """Return the command of an evaluation of a model, with the flags of a data set."""
        return [
            *(sys.executable, "-m", "megatron_profit", "evaluate", f"model={model}"),
            *shlex.split(self.evaluate[evaluation]),
            *shlex.split(self.data[data].get("evaluate", "")),
            *("--out", str(out)),
        ]

    def digest(self, command: Sequence[str]) -> str:
        """Return a fingerprint of a command and of the files that it names, the base's included.

        Raises:
            EvaluationError: The file of --dataset-info cannot be read.
        """
        parts = [part for part in command if part != sys.executable]
        for file in sorted(_inputs(command) | _described_inputs(command)):
            parts += [f"{entry} {_content(entry)}" for entry in _entries(file) if entry.is_file()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _entries(place: Path) -> list[Path]:
    """Return a file, or the entries of a folder; a saved data set has its splits in folders of its own."""
    if not place.is_dir():
        return [place]
    return sorted(place.rglob("*") if is_dataset(place) else place.iterdir())


def _content(file: Path) -> str:
    """Return a fingerprint of a file's content: its size, and both ends where it is large."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(_EDGE_BYTES)
        stream.seek(max(_EDGE_BYTES, size - _EDGE_BYTES))
        return f"{size} {hashlib.sha256(start + stream.read(_EDGE_BYTES)).hexdigest()}"


def _inputs(command: Sequence[str]) -> set[Path]:
    """Return the files and folders that a command reads, also as NAME=PLACE, without the program.

    The module after `-m` is none, although a checkout has a folder of its name. Outputs are none, although an
    earlier run has written them. Questions are in a usual folder if no flag names one.
    """
    words = set(_flags_with_values(command))
    places = {value for flag, value in words - _PLACEHOLDERS if flag not in _NO_INPUTS}
    flags = {flag for flag, _ in words}
    if "--tasks" in flags and "--data" not in flags:
        places.add(str(DATA))
    return {Path(place) for place in places if place and os.path.exists(place)}


def _flags_with_values(command: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each word with the one before it, and the two parts of NAME=VALUE; a path may hold "=" too."""
    for before, part in pairwise(command):
        name, is_one, value = part.partition("=")
        if is_one:
            yield name, value
        yield before, part


def _described_inputs(command: Sequence[str]) -> set[Path]:
    """Return the data of the entries of a --dataset-info that a command names."""
    infos = [value for flag, value in _flags_with_values(command) if flag == "--dataset-info"]
    try:
        places = [place for info in infos for place in places_of_entries(info, command)]
    except DataError as error:
        raise EvaluationError(error) from error
    return {place for place in places if place.exists()}


def folder_name(*parts: object) -> str:
    """Return a name of a folder. For example, ("profit 0.1", 3) gives "profit_0_1-3"."""
    return "-".join(re.sub(r"\W+", "_", str(part)) for part in parts)


def read_plan(file: Path, find_base: Callable[[str], str] = str) -> Plan:
    """Read a plan.

    Args:
        file: The plan.
        find_base: Returns the folder of the base that the plan names.

    Raises:
        EvaluationError: The file cannot be read, a key is unknown or missing, or a value does not fit.
    """
    import yaml

    from megatron_profit.yaml_names import NamesOnceLoader

    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.load(text, NamesOnceLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise EvaluationError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise EvaluationError(f"{file}: must be a YAML mapping with {', '.join(_REQUIRED)}")
    known = [each.name for each in fields(Plan) if each.name != "text"]
    for name in content:
        if name not in known:
            raise EvaluationError(f"{file}: unknown key {name!r}; the keys are {', '.join(known)}")
    if missing := [name for name in _REQUIRED if name not in content]:
        raise EvaluationError(f"{file}: {' and '.join(missing)} must be given")
    return replace(_plan(file, {"data": {"data": {}}} | content, find_base), text=text)


def _plan(file: Path, content: Mapping[str, Any], find_base: Callable[[str], str]) -> Plan:
    check = _Checks(file)
    values: dict[str, Any] = dict(content)
    values["base"] = Path(find_base(check.of(content, "base", str))).absolute()
    if not values["base"].is_dir():
        raise EvaluationError(f"{file}: base: {values['base']} is no folder")
    check.flags("train", content["train"], written := _written_by(content))
    if not isinstance(content["evaluate"], dict):
        values["evaluate"] = {UNNAMED: content["evaluate"]}
    for part, refused in (("evaluate", _OF_EVALUATIONS), ("objectives", written)):
        for name, flags in check.of(values, part, dict).items():
            check.flags(f"{part}: {name}".removesuffix(": "), flags, refused)
    for name, parts in check.of(content, "data", dict).items():
        if not isinstance(parts, dict) or not set(parts) <= {"train", "evaluate"}:
            raise EvaluationError(f"{file}: data: {name} must hold train and evaluate, both flags")
        for part, flags in parts.items():
            refused = written if part == "train" else _OF_EVALUATIONS
            check.flags(f"data: {name}: {part}", flags, refused)
    values |= check.axes(content)
    if "stages" in content:
        values["stages"] = check.stages(values)
    for name, least in (("processes", 1), ("jobs", 1), ("save_interval", 0)):
        if type(content.get(name, 1)) is not int or content.get(name, 1) < least:
            raise EvaluationError(
                f"{file}: {name} is {content[name]!r}; it must be at least {least}"
            )
    if not isinstance(content.get("keep_models", False), bool):
        raise EvaluationError(
            f"{file}: keep_models is {content['keep_models']!r}; it must be true or false"
        )
    return Plan(**values)


def _written_by(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the training flags that a comparison sets itself, with what takes their place in the plan.

    A stage that has rates or ranks of its own replaces the ones of the flags.
    """
    found = {"--hf-model": "give base", "--seed": "give seeds"}
    found |= dict.fromkeys(("--export-hf", "--metrics-file"), _SET_HERE)
    for key, flag in (("learning_rates", "--lr"), ("lora_ranks", "--lora-rank")):
        if key in content:
            found[flag] = f"drop it, or {key}"
    if content.get("save_interval"):
        found |= dict.fromkeys(("--save", "--load", "--save-interval"), "drop it, or save_interval")
    return found


class _Checks:
    """Checks of a plan's values, whose errors name the file."""

    def __init__(self, file: Path, where: str = "") -> None:
        self.file, self.where = file, where

    def of(self, content: Mapping[str, Any], name: str, kind: type) -> Any:
        """Return a value that must have a type and not be empty."""
        value = content[name]
        if not isinstance(value, kind) or not value:
            words = "text" if kind is str else "a mapping from names"
            raise EvaluationError(f"{self.file}: {name} is {value!r}; it must be {words}")
        for key in value if isinstance(value, dict) else ():
            if not isinstance(key, str):
                raise EvaluationError(
                    f"{self.file}: {name}: {key!r} is no text; put the name into quotes"
                )
        return value

    def flags(self, name: str, value: Any, refused: Mapping[str, str]) -> None:
        """Check a text of flags that a shell could read.

        Args:
            name: Where the text stands.
            value: The text.
            refused: Flags that it may not have, with the remedy.
        """
        try:
            words = shlex.split(value)
        except (ValueError, AttributeError, TypeError) as error:
            raise EvaluationError(
                f"{self.file}: {name} is {value!r}; it must be a text of flags ({error})"
            ) from error
        for flag in dict.fromkeys(word.partition("=")[0] for word in words):
            if flag in refused:
                raise EvaluationError(
                    f"{self.file}: {name} has {flag}, which has no place there; {refused[flag]}"
                )

    def axes(self, content: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """Return the numbers of the axes that are given."""
        kinds = {"learning_rates": float, "lora_ranks": int, "seeds": int}
        return {
            name: tuple(self.numbers(content, name, kind))
            for name, kind in kinds.items()
            if name in content
        }

    def stages(self, content: Mapping[str, Any]) -> tuple[dict[str, tuple[Any, ...]], ...]:
        """Return the axes that each stage narrows."""
        numbered = ("learning_rates", "lora_ranks", "seeds")
        stages = content["stages"]
        if not _is_list_of(stages, dict):
            raise EvaluationError(
                f"{self.file}: stages is {stages!r}; it must be a list of mappings"
            )
        found = []
        for place, stage in enumerate(stages, 1):
            check = _Checks(self.file, f"stages: {place}: ")
            for name in stage:
                if name not in (*_NAMED_AXES, *numbered):
                    raise EvaluationError(
                        f"{self.file}: stages: {place}: unknown key {name!r}; the keys are "
                        f"{', '.join((*_NAMED_AXES, *numbered))}"
                    )
            named = {
                name: check.names(stage, name, content[name])
                for name in _NAMED_AXES
                if name in stage
            }
            found.append({**named, **check.axes(stage)})
        return tuple(found)

    def names(
        self, content: Mapping[str, Any], name: str, known: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Return the different names of a list, which must all be known."""
        values = content[name]
        if not _is_list_of(values, str) or len(set(values)) < len(values):
            raise EvaluationError(
                f"{self.file}: {self.where}{name} is {values!r}; it must be a list of different names"
            )
        for value in values:
            if value not in known:
                raise EvaluationError(
                    f"{self.file}: {self.where}{name}: there is no {value!r}; the plan has "
                    f"{', '.join(known)}"
                )
        return tuple(values)

    def numbers(self, content: Mapping[str, Any], name: str, kind: type) -> list[Any]:
        """Return the different numbers of a list."""
        values = content[name]
        # YAML reads 1e-5 as text.
        raw = (int, float, str) if kind is float else (int, str)
        try:
            found = [kind(value) for value in values] if _is_list_of(values, *raw) else []
        except ValueError:
            found = []
        if (
            not found
            or not all(0 <= n < float("inf") for n in found)
            or len(set(found)) < len(found)
        ):
            kinds = "numbers" if kind is float else "whole numbers"
            raise EvaluationError(
                f"{self.file}: {self.where}{name} is {values!r}; it must be a list of different {kinds}, "
                "none below 0"
            )
        return found


def _is_list_of(values: Any, *kinds: type) -> bool:
    """Return whether a value is a list of such values, and not empty. True and false are no numbers."""
    return isinstance(values, list) and bool(values) and all(type(v) in kinds for v in values)
