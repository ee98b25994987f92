"""How answers are drawn: the sampling settings, with the settings of the papers by name."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.flags import flag_of


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
            (
                "max_new_tokens",
                self.max_new_tokens is None or self.max_new_tokens >= 1,
                "at least 1",
            ),
        ):
            if not holds:
                raise EvaluationError(
                    f"{flag_of(name)} is {getattr(self, name)}; it must be {rule}"
                )
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


PRESETS = {
    "greedy": Sampling(),
    "profit-qwen": Sampling(0.7, 0.8, 20, samples=8, max_new_tokens=8192),
    "profit-llama": Sampling(0.6, 0.9, samples=8, max_new_tokens=8192),
    "psft": Sampling(0.7, 0.95, samples=32, max_new_tokens=10240),
}
# Preset and task -> what differs there.
_EXCEPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    (preset, task): {"samples": 32, "max_new_tokens": 32768}
    for preset in ("profit-qwen", "profit-llama")
    for task in ("aime24", "aime25")
}


def choose_sampling(preset: str | None, task: str, given: Mapping[str, Any]) -> Sampling:
    """Return the settings of a task: the preset's, then the flags that were given.

    Without a preset, one sample is greedy, and several are drawn as ProFit draws them for Qwen.

    Args:
        preset: Name of a preset, or None.
        task: Name of the task.
        given: Fields that the user set.

    Raises:
        EvaluationError: A value does not fit, or would change no draw.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if preset is None:
        several = given.get("samples", 1) > 1 and "temperature" not in given
        start = replace(PRESETS["profit-qwen" if several else "greedy"], max_new_tokens=None)
    else:
        start = replace(PRESETS[preset], **_EXCEPTIONS.get((preset, task), {}))
    if given.get("temperature") == 0:
        given = {"samples": 1} | given
    # One replacement, so that only the settings in force are checked.
    sampling = replace(start, **given)
    if sampling.is_greedy:
        _check_cuts(given)
    return sampling


def _check_cuts(given: Mapping[str, Any]) -> None:
    """Refuse flags that leave tokens out of a draw where each token is the most likely one."""
    cuts = [
        f"{flag_of(name)} {given[name]}"
        for name, neutral in (("top_p", 1), ("top_k", 0))
        if given.get(name, neutral) != neutral
    ]
    if cuts:
        raise EvaluationError(
            f"{' and '.join(cuts)} would change no answer at temperature 0; give --temperature, for example "
            "0.7, or leave them out"
        )
