"""The training's flags that follow from model, data and machine, where the command line gives none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_profit.estimates.saving import save_seconds
from megatron_profit.flags import flag_of
from megatron_profit.launch.plan_layout import PlannedLayout
from megatron_profit.launch.run_folder import RunFolder
from megatron_profit.recipe.flags import Given
from megatron_profit.recipe.request import Request

# The ProFit paper's settings; LoRA's usual rate is ten times as high.
_RATE, _LORA_RATE = "1e-5", "1e-4"
_OPTIMIZER = {"--min-lr": "0", "--lr-decay-style": "cosine"}
_REGULARISATION = {"--clip-grad": "1.0", "--weight-decay": "0"}
_WARMUP = "0.1"
_THRESHOLD, _DIRECTION = "0.1", "higher"
_KEEP_LAST = "2"
# Derived flags that the training refuses next to a given one, and one that it refuses without another.
_REFUSED_WITH = {
    "--keep-last": "save_retain_interval",
    "--global-batch-size": "step_batch_size_schedule",
    "--overlap-param-gather": "save_params_interval",
}
_NEEDS = {"--overlap-param-gather": "--overlap-grad-reduce"}
# Time between two checkpoints: half an hour, or 50 times what writing one takes, at most four hours.
_SAVE_SECONDS, _SAVE_FACTOR, _LONGEST_SECONDS = 1800.0, 50, 4 * 3600.0
_EVALUATIONS = 5


@dataclass(frozen=True)
class Model:
    """The model that is trained.

    Attributes:
        folder: Its HuggingFace folder.
        architecture: Megatron's arguments of it.
        parameters: Number of its parameters.
        base_id: Its id and revision on the hub, where they do not follow from the folder.
    """

    folder: Path
    architecture: Mapping[str, Any]
    parameters: int
    base_id: str | None = None

    @property
    def positions(self) -> int:
        """The longest row that it takes."""
        return self.architecture["max_position_embeddings"]

    def __str__(self) -> str:
        return f"{self.folder} ({self.parameters / 1e9:.3g} billion parameters, {self.positions:,} positions)"


@dataclass(frozen=True)
class Intervals:
    """Steps between evaluations, and between checkpoints.

    Attributes:
        evaluation, save: The given numbers, or derived ones.
    """

    evaluation: int
    save: int

    @classmethod
    def of(cls, request: Request, steps: int, saved_every: int) -> Intervals:
        """Return the intervals of a run.

        A given interval that the training wants to be a multiple of `--eval-interval` is one, and so is a
        derived `--save-interval` where checkpoints are kept by an evaluation. For example, 103 steps have an
        evaluation every 20, and then checkpoints every 100. A given `--save-retain-interval` is a multiple of
        the derived `--save-interval`: one for 626 steps, wanted every 90, has checkpoints every 313.

        Args:
            request: The command line.
            steps: Steps of the run.
            saved_every: Steps between two checkpoints by their time.
        """
        given, by_evaluation = request.values, "keep_best" in request.given
        saves = ("save_interval", "save_retain_interval") if by_evaluation else ()
        multiples = ("eval_tasks_interval", *saves)
        shared = math.gcd(*(given[name] for name in multiples if name in given))
        wanted = max(1, steps // _EVALUATIONS)
        divisors = (number for number in range(min(wanted, shared), 0, -1) if shared % number == 0)
        evaluation = given.get("eval_interval", next(divisors, wanted))
        compared = given.get("eval_tasks_interval", evaluation)
        unit = compared if by_evaluation and compared > 0 else 1
        retained = given.get("save_retain_interval") or 0  # which every number divides
        possible = range(unit, max(retained, saved_every) + 1, unit)
        fits = [number for number in possible if retained % number == 0] or [unit]
        save = max((number for number in fits if number <= saved_every), default=fits[0])
        if retained and 2 * save < saved_every:
            save = next((number for number in fits if number > saved_every), save)
        return cls(evaluation, given.get("save_interval", save))


class _Flags:
    """The flags of a run in the order of the command: derived ones, and given ones in their places."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._flags: dict[str, Given] = {}

    def put(self, option: str, value: Any) -> None:
        """Put a flag, whatever was given."""
        self._flags[self._request.table.dest(option)] = Given.of(option, value)

    def add(self, option: str, value: Any = True) -> None:
        """Put a flag as it was given, else with this value, unless it is not wanted or would be refused."""
        table, given = self._request.table, self._request.given
        left_out = {option, _NEEDS.get(option)} & set(self._request.front.without)
        if left_out or option not in table.options or _REFUSED_WITH.get(option) in given:
            return
        dest = table.dest(option)
        self._flags[dest] = given.get(dest) or Given.of(option, value)

    def all(self) -> list[Given]:
        """Return all flags: first the ones that were put, then the other given ones."""
        given = self._request.given
        return [*self._flags.values(), *(given[k] for k in given if k not in self._flags)]


def derived_flags(
    request: Request,
    model: Model,
    data: Mapping[str, list[str]],
    planned: PlannedLayout,
    run: RunFolder,
    intervals: Intervals,
) -> list[Given]:
    """Return all flags of the training.

    Args:
        request: The command line.
        model: The model.
        data: Paths of the data, by argument: `data`, and `valid_data` where it is given.
        planned: The layout.
        run: The run's folder.
        intervals: Steps between evaluations and checkpoints.
    """
    flags, given = _Flags(request), request.given
    flags.put("--hf-model", str(model.folder))
    if model.base_id is not None:
        flags.add("--base-model-id", model.base_id)
    for name, paths in data.items():
        flags.put(given[name].option, paths)
    for option, value in objective_defaults(request).items():
        flags.add(option, value)
    flags.add("--seq-length", planned.seq_length)
    if not {"train_iters", "train_samples"} & given.keys():
        flags.add("--epochs", "1")
    _add_optimizer(flags, request)
    if planned.on_gpus and not {"bf16", "fp16"} & given.keys():
        flags.add("--bf16")
    for name, value in planned.flags.items():
        flags.add(flag_of(name), value)
    if run.loads_own(request):
        flags.add("--load", str(run.saved(request)))
    flags.add("--save", str(run.checkpoints))
    flags.add("--save-interval", intervals.save)
    if "--save" not in request.front.without:
        flags.add("--keep-last", _KEEP_LAST)
    if {"valid_data", "valid_split"} & given.keys():
        flags.add("--eval-interval", intervals.evaluation)
    flags.add("--metrics-file", str(run.metrics))
    if not request.front.verbose:
        flags.add("--quiet")
    flags.add("--export-hf", str(run.export))
    flags.add("--tensorboard-dir", str(run.tensorboard))
    if "wandb_project" in given:
        flags.add("--wandb-exp-name", run.path.name)
    return flags.all()


def objective_defaults(request: Request) -> dict[str, str]:
    """Return the objective by its flag, with the options of ProFit that do not follow from given ones."""
    if request.value("objective") not in (None, "profit"):
        return {"--objective": request.value("objective")}
    direction = "random" if "keep_fraction" in request.given else _DIRECTION
    derived = {"--objective": "profit", "--threshold-direction": direction}
    others = {"threshold_quantile", "keep_fraction"} & request.given.keys()
    if not others and request.value("threshold_direction") in (None, "higher", "lower"):
        derived["--prob-threshold"] = _THRESHOLD
    return derived


def _add_optimizer(flags: _Flags, request: Request) -> None:
    flags.add("--lr", _LORA_RATE if request.value("lora_rank") else _RATE)
    for option, value in _OPTIMIZER.items():
        flags.add(option, value)
    if not {"lr_warmup_iters", "lr_warmup_samples"} & request.given.keys():
        flags.add("--lr-warmup-fraction", _WARMUP)
    for option, value in _REGULARISATION.items():
        flags.add(option, value)


def save_interval(step_seconds: float, steps: int, nbytes: int) -> int:
    """Return the steps between two checkpoints, by the time of a step and by a checkpoint's size.

    For example, a 14B model's 200 GB are written every two and three quarter hours. A job of a few hours has
    to save too, so the longest time is four hours.
    """
    seconds = min(max(_SAVE_SECONDS, _SAVE_FACTOR * save_seconds(nbytes)), _LONGEST_SECONDS)
    wanted = seconds / max(step_seconds, 1e-3)
    return max(1, min(round(wanted), steps))
