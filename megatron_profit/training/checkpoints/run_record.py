"""The record of a run in its checkpoints: objective, data, tokenizer, seed, schedule and so on.

Each checkpoint holds the record of the run that wrote it, in `megatron_profit.json` under the key `run`. A
run that resumes compares its own record with that one (`training/plan/compare.py`). The parallel layout is
not part of it: for example, a run on 8 GPUs may resume on 16.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt

import megatron_profit
from megatron_profit.megatron_patches.upstream.sources import installed_version
from megatron_profit.objectives import RENAMED_NORMALIZATIONS, RENAMED_OPTIONS

Settings = Mapping[str, Any]

# Parts of the record that make another run when they change; --allow-change names them.
GUARDED = ("objective", "data", "validation", "tokenizer", "seed", "base")

_PACKAGES = ("torch", "transformers")
_DIGEST_LENGTH = 24
# Settings that say where files are, what they are called, or how their records are written down.
_PLACES = ("sources", "path", "files", "base", "revision", "folder", "start")
# Keys of a config.json that name the program or the place it was written by, not the model.
_NOT_OF_THE_MODEL = ("transformers_version", "_name_or_path")


@dataclass(frozen=True)
class Difference:
    """A setting with another value than in the checkpoint.

    Attributes:
        part: Attribute of `RunRecord`.
        setting: Its key there. The key of an inner mapping follows after a dot: "options.prob_threshold".
        saved, now: The value in the checkpoint and in this run.
    """

    part: str
    setting: str
    saved: Any
    now: Any


@dataclass(frozen=True)
class RunRecord:
    """The parts of a run. Each is a mapping of JSON values by name; {} where it is not known.

    Attributes:
        objective: `name`, its `options`, `normalization`, `warmup_steps`, `schedules`, and, where it has
            them, `steps_per_refresh` and the digest of the `reference` model.
        data: `digest` of the tokenised training examples, their number (`examples`), `supervised_tokens`,
            the `sources` (paths), their `files` with digests, and the flags that decide which rows are drawn,
            such as `seq_length` and `packing`.
        validation: The same for the validation data, and `eval_tasks_limit` and `eval_flags` if --keep-best
            names a task.
        tokenizer: `digest` of the files of the tokenizer, the chat template among them, and `turn_end_id`,
            the token that training teaches to end a turn with; exports stop there.
        seed: `seed`.
        model: `digest` of config.json, and the base for a model card: `base` and `revision` on the hub, the
            name of its `folder`, and `start`, the first weights if they are not its own.
        lora: The options of the adapters, if the run trains adapters.
        base: `path` of the weights that the run starts from, and their `digest`; the frozen ones of adapters.
        schedule: Learning rate and weight decay with their schedules.
        length: `train_iters`, `train_samples`, `epochs`.
        batch: `global_batch_size`.
        optimizer: Kind, momenta, clipping, precision.
        versions: Versions of packages, by name.
    """

    objective: Settings = field(default_factory=dict)
    data: Settings = field(default_factory=dict)
    validation: Settings = field(default_factory=dict)
    tokenizer: Settings = field(default_factory=dict)
    seed: Settings = field(default_factory=dict)
    model: Settings = field(default_factory=dict)
    lora: Settings = field(default_factory=dict)
    base: Settings = field(default_factory=dict)
    schedule: Settings = field(default_factory=dict)
    length: Settings = field(default_factory=dict)
    batch: Settings = field(default_factory=dict)
    optimizer: Settings = field(default_factory=dict)
    versions: Settings = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values; `from_json` reads them."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_json(cls, value: Any) -> RunRecord:
        """Return the record that `to_json` gave.

        Unknown parts are left out and missing ones are empty: another version may have written the record.

        Raises:
            ValueError: The value is not an object of objects.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"the record of a run must be an object, found {type(value).__name__}")
        parts = {part.name: value.get(part.name, {}) for part in fields(cls)}
        for name, part in parts.items():
            if not isinstance(part, Mapping):
                raise ValueError(
                    f"{name} in the record of a run must be an object, found {type(part).__name__}"
                )
        return cls(**{**parts, "objective": _renamed(parts["objective"])})

    def differences(self, saved: RunRecord) -> tuple[Difference, ...]:
        """Return the settings that both records have and that differ, in the order of the parts.

        Places and names of files (`_PLACES`) do not count: only the content that is trained does.
        """
        now, then = (dict(_flat(record.to_json())) for record in (self, saved))
        changed = [
            key for key in now if key in then and then[key] != now[key] and key[1] not in _PLACES
        ]
        return tuple(Difference(*key, then[key], now[key]) for key in changed)


def _renamed(objective: Settings) -> Settings:
    """Return the record of an objective with the names of today."""
    found = dict(objective)
    if isinstance(options := objective.get("options"), Mapping):
        found["options"] = {RENAMED_OPTIONS.get(name, name): options[name] for name in options}
    if "normalization" in objective:
        divisor = objective["normalization"]
        found["normalization"] = RENAMED_NORMALIZATIONS.get(str(divisor), divisor)
    return found


def _flat(parts: Mapping[str, Settings]) -> Iterator[tuple[tuple[str, str], Any]]:
    """Yield each value with its part and its dotted name. For example, `("objective",
    "options.prob_threshold"), 0.1`.
    """
    for part, settings in parts.items():
        for name, value in settings.items():
            if isinstance(value, Mapping):
                for (_, inner), item in _flat({part: value}):
                    yield (part, f"{name}.{inner}"), item
            else:
                yield (part, name), value


def digest_of_arrays(*arrays: npt.NDArray[Any]) -> str:
    """Return a hash of the values of arrays, in their order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str((array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:_DIGEST_LENGTH]


def digest_of_json(value: Any) -> str:
    """Return a hash of JSON values, in which the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_LENGTH]


def digest_of_config(config: Mapping[str, Any]) -> str:
    """Return a hash of the content of a config.json that does not depend on who wrote it."""
    return digest_of_json({k: v for k, v in config.items() if k not in _NOT_OF_THE_MODEL})


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that a run's numbers depend on."""
    found = {"megatron_profit": megatron_profit.__version__}
    # A source tree of Megatron on PYTHONPATH is not the installed package.
    found["megatron-core"] = installed_version("megatron").partition(" ")[2]
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
