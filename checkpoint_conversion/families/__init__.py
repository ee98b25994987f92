"""The model families that can be converted. A new one is a module here and an entry in FAMILIES."""

from __future__ import annotations

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families.family import (
    CHANGEABLE_ARGUMENTS,
    Config,
    Family,
    TensorRule,
    extra_states,
)
from checkpoint_conversion.families.llama import LLAMA
from checkpoint_conversion.families.olmo2 import OLMO2
from checkpoint_conversion.families.qwen2 import QWEN2
from checkpoint_conversion.families.qwen3 import QWEN3
from checkpoint_conversion.families.qwen3_5 import QWEN3_5
from checkpoint_conversion.families.qwen3_moe import QWEN3_MOE

FAMILIES = (QWEN3, QWEN3_MOE, *QWEN3_5, QWEN2, LLAMA, OLMO2)

__all__ = [
    "CHANGEABLE_ARGUMENTS",
    "FAMILIES",
    "Config",
    "Family",
    "TensorRule",
    "extra_states",
    "family_for",
]


def family_for(config: Config) -> Family:
    """Return the family of a HuggingFace configuration (see `hf.folder.read_hf_config`).

    Raises:
        ConversionError: For an unknown architecture, or a configuration of a known one with a feature
            that is not supported.
    """
    declared = config.get("architectures") or []
    if not isinstance(declared, list) or not all(isinstance(name, str) for name in declared):
        raise ConversionError(
            f"config.json has architectures={declared!r}; a list of names is needed"
        )
    kind = config.get("model_type")
    for family in FAMILIES:
        if tuple(declared) == family.architectures or (not declared and kind == family.model_type):
            if kind not in (family.model_type, None):
                raise ConversionError(
                    f"config.json contradicts itself: architectures={declared!r}, model_type={kind!r}"
                )
            family.megatron_arguments(config)
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ConversionError(
        f"config.json declares architectures={declared!r} and model_type={kind!r}; supported: {supported}"
    )
