"""Reader of config.json, which checks values and refuses unsupported features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families.family import Config

_FRACTION = "partial_rotary_factor"
# Megatron-Core computes with these values in every family here.
_REQUIRED = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "quantization_config": None,
    _FRACTION: 1,
}
# More than any model has, and small enough that a plan fits into memory.
_MOST = {"num_hidden_layers": 2000, "num_attention_heads": 8192, "num_experts": 100_000}
_MOST_ELSE = 2**31 - 1
# The part of a config.json that is the language model's, where the model has other parts too.
TEXT = "text_config"
# Megatron-Core has `--rope-scaling-factor` for Llama 3's scaling; the other numbers are constants
# (megatron/core/models/common/embeddings/rotary_pos_embedding.py, _apply_scaling).
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def text_part(config: Config) -> Config | None:
    """Return the part `text_config` of a config.json; None where it has none, or null.

    Raises:
        ConversionError: It is no object.
    """
    text = config.get(TEXT)
    if text is not None and not isinstance(text, dict):
        raise ConversionError(f"config.json has {TEXT}={str(text)[:40]!r}; an object is needed")
    return text


def text_config(config: Config) -> Config:
    """Return the configuration of the language model: of a model with images, the part `text_config`.

    `tie_word_embeddings` and `quantization_config` belong to the whole model. transformers reads them at the
    top, whatever the part says: it writes its default there. Without the first at the top, nothing is tied.

    Raises:
        ConversionError: `text_config` is no object.
    """
    text = text_part(config)
    if text is None:
        return config
    quantization = config.get("quantization_config") or text.get("quantization_config")
    whole = {"tie_word_embeddings": config.get("tie_word_embeddings")}
    return {**text, **whole, "quantization_config": quantization}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        theta: The base.
        llama3_factor: The factor of Llama 3's frequency scaling; None without scaling.
        fraction: The share of a head's dimensions that it turns.
    """

    theta: float
    llama3_factor: float | None = None
    fraction: float = 1.0


@dataclass(frozen=True)
class ConfigReader:
    """Values of a config.json.

    Attributes:
        family: The name of the family; for messages.
        required: Values that a key must have if it is present.
        defaults: Defaults of the configuration class in transformers, for keys that a config.json may
            leave out.
        llama3_rope: Whether the family supports Llama 3's scaling of the rotary frequencies.
        rotary_fraction: The default share of a head that is rotated; None for families that rotate all of it.
        rope_ignored: Rotary parameters that do not change a text.
        layer_kinds: Values that `layer_types` may hold.
    """

    config: Config
    family: str
    required: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    llama3_rope: bool = False
    rotary_fraction: float | None = None
    rope_ignored: tuple[str, ...] = ()
    layer_kinds: tuple[str, ...] = ("full_attention",)

    def __post_init__(self) -> None:
        required = {**_REQUIRED, **self.required}
        if self.rotary_fraction is not None:
            del required[_FRACTION]
        for key, supported in required.items():
            value = self.config.get(key)
            if value is not None and value != supported:
                raise self.refused(key, value, f"{key}={supported!r}")
        kinds = self.config.get("layer_types")
        if kinds is not None and not isinstance(kinds, list):
            raise self.refused("layer_types", kinds, "a list")
        for kind in kinds or ():
            if kind not in self.layer_kinds:
                known = " or ".join(map(repr, self.layer_kinds))
                raise self.refused("layer_types", kind, f"{known} in every layer")

    def refused(self, key: str, value: object, supported: str) -> ConversionError:
        """Return the error for a value that cannot be converted."""
        return ConversionError(
            f"config.json has {key}={value!r}; for {self.family}, supported is {supported}"
        )

    def value(self, key: str) -> Any:
        """Return the value, or its default; None without one."""
        value = self.config.get(key)
        return self.defaults.get(key) if value is None else value

    def size(self, *keys: str) -> int:
        """Return the positive integer under the first of the keys that is present."""
        key = next((key for key in keys if self.value(key) is not None), keys[0])
        value = self.value(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refused(key, value, "a positive integer")
        if value > _MOST.get(keys[0], _MOST_ELSE):
            raise self.refused(key, value, f"at most {_MOST.get(keys[0], _MOST_ELSE)}")
        return value

    def flag(self, key: str) -> bool:
        """Return a truth value; False if it is absent."""
        value = self.value(key)
        if value not in (True, False, None):
            raise self.refused(key, value, "true or false")
        return bool(value)

    def number(self, key: str, *, at_least: float | None = None) -> float:
        """Return a number that is positive, or at least `at_least`."""
        return self._number(key, self.value(key), at_least)

    def rope(self) -> Rope:
        """Return the rotary embedding.

        transformers 5 and later write it to `rope_parameters`. Before, the base was at the top level
        and the scaling in `rope_scaling`. A file may have both forms, and old and new readers choose
        differently between them, so the two must agree.
        """
        thetas = {"rope_theta": self.value("rope_theta")}
        fractions = {_FRACTION: self.config.get(_FRACTION)}
        factors = {}
        for key in ("rope_scaling", "rope_parameters"):
            rope = self.config.get(key)
            if rope:
                factors[key] = self._scaling(key, rope)
                thetas[f"{key}.rope_theta"] = rope.get("rope_theta")
                fractions[f"{key}.{_FRACTION}"] = rope.get(_FRACTION)
        theta = self._agreed(self._numbers(thetas))
        if theta is None:
            raise self.refused(
                "rope_theta",
                None,
                "a positive number (transformers takes 10000 here: write it down)",
            )
        fraction = self._agreed(self._numbers(fractions)) or self.rotary_fraction or 1.0
        if fraction > 1:
            raise self.refused(_FRACTION, fraction, "a number above 0, up to 1")
        return Rope(theta, self._agreed(factors), fraction)

    def _numbers(self, values: Mapping[str, Any]) -> dict[str, float]:
        return {
            key: self._number(key, value, None)
            for key, value in values.items()
            if value is not None
        }

    def _agreed(self, values: Mapping[str, float | None]) -> float | None:
        """Return the one value that the keys have; None without a key.

        Raises:
            ConversionError: They differ.
        """
        if len(set(values.values())) > 1:
            both = ", ".join(f"{key}={self._at(key)!r}" for key in values)
            raise ConversionError(
                f"config.json contradicts itself: {both}; make them equal, or remove the wrong one"
            )
        return next(iter(values.values()), None)

    def _at(self, path: str) -> Any:
        """Return the value under a path of one key, or of two keys joined by a dot."""
        outer, _, inner = path.partition(".")
        return self.config[outer][inner] if inner else self.config[outer]

    def _scaling(self, key: str, rope: Any) -> float | None:
        """Return the factor of Llama 3's scaling; None for rotary parameters without scaling."""
        is_known = isinstance(rope, dict)
        kind = rope.get("rope_type", rope.get("type", "default")) if is_known else None
        if is_known and rope.get("type", kind) != kind:
            raise self.refused(key, rope, "one value for rope_type and type, its older name")
        if kind == "llama3" and self.llama3_rope:
            self._check_rope(key, rope, {**_LLAMA3, "factor": None})
            return self._number(f"{key}.factor", rope.get("factor"), 1.0)
        if kind == "default":
            self._check_rope(key, rope, {})
            return None
        known = "'default' or 'llama3'" if self.llama3_rope else "'default', no scaling"
        raise self.refused(key, rope, f"rope_type={known}")

    def _check_rope(self, key: str, rope: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        """Refuse parameters that are unknown or differ from Megatron-Core's constants."""
        plain = {"rope_type": None, "type": None, "rope_theta": None, _FRACTION: 1}
        if self.rotary_fraction is not None:
            plain |= dict.fromkeys((_FRACTION, *self.rope_ignored))
        for name, value in rope.items():
            known = {**plain, **expected}
            if name not in known or known[name] not in (None, value):
                supported = {k: v for k, v in known.items() if v is not None}
                raise self.refused(key, dict(rope), f"no other parameter than {supported}")
        for name in expected:
            if name not in rope:
                raise self.refused(key, dict(rope), f"with {name}")

    def _number(self, key: str, value: object, at_least: float | None) -> float:
        supported = "a positive number" if at_least is None else f"a number from {at_least:g} on"
        if isinstance(value, bool) or not isinstance(value, float | int):
            raise self.refused(key, value, supported)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or (number <= 0 if at_least is None else number < at_least):
            raise self.refused(key, value, supported)
        return number
