"""How answers are drawn: the sampling settings, with the settings of the papers by name."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_profit.evaluation.errors import EvaluationError


@dataclass(frozen=True)
class Sampling:
    """Settings of one evaluation.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Draw from the most likely tokens that together have this probability.
        top_k: Draw from this many most likely tokens; 0 for all.
        samples: Answers to each question.
        max_new_tokens: Longest answer; None for the task's own limit.
        seed: Seed of all draws. Each (task, question, sample) has its own numbers, so a draw does not
            depend on the batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    samples: int = 1
    max_new_tokens: int | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0 (0 for all tokens)"),
            ("samples", self.samples >= 1, "at least 1"),
            ("max_new_tokens", (self.max_new_tokens or 1) >= 1, "at least 1"),
            ("max_new_tokens", self.max_new_tokens != 0, "at least 1"),
        ):
            if not holds:
                flag = "--" + name.replace("_", "-")
                raise EvaluationError(f"{flag} is {getattr(self, name)}; it must be {rule}")
        if self.samples > 1 and self.is_greedy:
            raise EvaluationError(
                f"{self.samples} samples at temperature 0 would all be the same; give --temperature or "
                "--preset, or --samples 1"
            )

    @property
    def is_greedy(self) -> bool:
        """True if each token is the most likely one."""
        return self.temperature == 0

    def numbers(self, *place: object) -> random.Random:
        """Return the random numbers of one answer. For example, `numbers("gsm8k", 3, 0)`."""
        return random.Random(":".join(map(str, (self.seed, *place))))

    def __str__(self) -> str:
        if self.is_greedy:
            drawn = "greedy"
        else:
            top_k = f", top-k {self.top_k}" if self.top_k else ""
            drawn = f"temperature {self.temperature:g}, top-p {self.top_p:g}{top_k}"
        limit = f", at most {self.max_new_tokens:,} new tokens" if self.max_new_tokens else ""
        return f"{drawn}, {self.samples} sample{'s'[: self.samples > 1]} a question{limit}"


@dataclass(frozen=True)
class Preset:
    """Settings of a paper.

    Attributes:
        sampling: The settings.
        source: Where they come from.
        exceptions: Task -> fields that differ there.
    """

    sampling: Sampling
    source: str
    exceptions: Mapping[str, Mapping[str, int]]

    def of(self, task: str) -> Sampling:
        """Return the settings for a task."""
        return replace(self.sampling, **self.exceptions.get(task, {}))  # type: ignore[arg-type]


_AIME_OF_PROFIT = {"samples": 32, "max_new_tokens": 32768}
_PROFIT = {"aime24": _AIME_OF_PROFIT, "aime25": _AIME_OF_PROFIT}
PRESETS = {
    "greedy": Preset(Sampling(), "one greedy answer", {}),
    "profit-qwen": Preset(
        Sampling(0.7, 0.8, 20, samples=8, max_new_tokens=8192), "ProFit, Qwen and OLMo", _PROFIT
    ),
    "profit-llama": Preset(
        Sampling(0.6, 0.9, samples=8, max_new_tokens=8192), "ProFit, Llama", _PROFIT
    ),
    "psft": Preset(Sampling(0.7, 0.95, samples=32, max_new_tokens=10240), "PSFT", {}),
}


def choose_sampling(preset: str | None, task: str, given: Mapping[str, Any]) -> Sampling:
    """Return the settings of a task: the preset's, then the flags that were given.

    Without a preset, one sample is greedy, and several are drawn as ProFit draws them for Qwen.

    Args:
        preset: Name of a preset, or None.
        task: Name of the task.
        given: Fields that the user set.

    Raises:
        EvaluationError: A value does not fit.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if preset is None:
        several = given.get("samples", 1) > 1 and "temperature" not in given
        start = PRESETS["profit-qwen" if several else "greedy"].sampling
        start = replace(start, max_new_tokens=None)
    else:
        start = PRESETS[preset].of(task)
    if given.get("temperature") == 0:
        given = {"samples": 1} | given
    # One replacement, so that only the settings in force are checked.
    return replace(start, **given)


def as_record(sampling: Sampling) -> dict[str, Any]:
    """Return the settings for a JSON record."""
    return asdict(sampling)
