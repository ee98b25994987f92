"""The model families that can be converted; a new one is a module here and an entry in FAMILIES."""

from __future__ import annotations

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families.family import Config, Family, TensorRule
from checkpoint_conversion.families.qwen3 import QWEN3

FAMILIES = (QWEN3,)

__all__ = ["FAMILIES", "Config", "Family", "TensorRule", "family_for"]


def family_for(config: Config) -> Family:
    """The family of a HuggingFace configuration (see `hf_folder.read_hf_config`).

    Raises:
        ConversionError: For an unknown architecture, or a configuration of a known one with a
            feature that is not supported.
    """
    declared = config.get("architectures") or []
    for family in FAMILIES:
        by_type = not declared and config.get("model_type") == family.model_type
        if by_type or (len(declared) == 1 and declared[0] in family.architectures):
            family.check(config)
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ConversionError(
        f"config.json declares architectures={declared!r} and "
        f"model_type={config.get('model_type')!r}; supported: {supported}"
    )
