"""The size of a checkpoint, and whether there is space for it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint_conversion.adapters.options import LoraOptions, adapter_rules
from checkpoint_conversion.engine.output import nearest_existing
from checkpoint_conversion.families import family_for
from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.hf.model import expected_shapes
from checkpoint_conversion.progress import human
from megatron_profit.estimates.saving import checkpoint_bytes, describe_save
from megatron_profit.training.checkpoints.folder import CheckpointError
from megatron_profit.training.process.console import print_rank_0

# Metadata, random generators and torch's header of each tensor.
_SPARE_SHARE, _SPARE_BYTES = 0.01, 1 << 20


def check_space_at_start(
    save: Path, hf_model: Path, settings: Mapping[str, Any], lora: LoraOptions | None = None
) -> None:
    """Print the size of a checkpoint, and refuse a run whose first one would find too little space.

    Args:
        save: The folder of the checkpoints; it need not exist.
        hf_model: Folder of the model.
        settings: All arguments by name.
        lora: The adapters, if the checkpoints hold adapters.

    Raises:
        CheckpointError: Names both sizes and the remedy.
    """
    config = read_hf_config(hf_model)
    rules = family_for(config).tensor_rules(config)
    shapes = expected_shapes(rules if lora is None else adapter_rules(rules, lora))
    size, free = checkpoint_bytes(settings, sum(map(math.prod, shapes.values()))), _free(save)
    if free < size and not settings["overwrite"]:
        raise CheckpointError(
            f"--save {save} has {human(free)} of space left, and a checkpoint takes about {human(size)} (an "
            "estimate from the flags); free some, name a folder on another disk, or leave out the state of "
            "the optimizer with --no-save-optim"
        )
    print_rank_0(
        f"> a checkpoint takes {describe_save(size)} (estimates); --save {save} has {human(free)} left"
    )


def check_space(save: Path, size: int) -> None:
    """Refuse to begin a checkpoint for which there is too little space.

    Args:
        save: The folder of the checkpoints.
        size: Bytes of the tensors.

    Raises:
        CheckpointError: Names both sizes and what to do.
    """
    free = _free(save)
    if free < size * (1 + _SPARE_SHARE) + _SPARE_BYTES:
        raise CheckpointError(
            f"it takes {human(size)}, and {save} has {human(free)} left; the checkpoints there are as they "
            f"were. Free some space, and give the same command again, with --load {save}; --keep-last N "
            "removes older checkpoints"
        )


def _free(folder: Path) -> int:
    return shutil.disk_usage(nearest_existing(folder)).free
