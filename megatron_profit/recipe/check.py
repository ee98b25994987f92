"""Checks of a training's command line that need neither torch nor Megatron, whose imports take seconds.

The training entry makes them before it imports Megatron, and `megatron-profit sft` before it starts the
training. The entry's own parser is Megatron's, so it checks everything once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_profit.data.errors import DataError
from megatron_profit.data.options import DataOptions, check_first_records
from megatron_profit.flags import ArgumentsError
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.recipe.flags import FlagTable, Given, is_listed_version
from megatron_profit.training.arguments.derive import settings_of
from megatron_profit.training.arguments.platform import has_driver


def check_command_line(
    argv: Sequence[str],
    processes: int,
    device: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a command line of the training as far as it can be judged here.

    Flags of another version of Megatron, and the options of an objective from outside, are not judged.

    Args:
        argv: The flags of `megatron_profit.sft`.
        processes: Number of processes of the run.
        device: "cuda" or "cpu"; None for the one that the flags and this machine suggest.
        config: The content of config.json; None to read it in the folder that --hf-model names.

    Raises:
        LaunchError: A flag is unknown or cannot be used, or the data are missing or in no known format.
        ConversionError: config.json is missing, broken or of an unknown architecture.
    """
    table = FlagTable()
    given = table.parse(argv)
    if not is_listed_version() or table.has_outside_objective(given):
        return
    try:
        flags = table.command_line(given)
        settings = settings_of(flags, device or _device(given), processes, config)
        check_first_records(DataOptions.from_flags(settings.data_flags))
    except (ArgumentsError, DataError) as error:
        raise LaunchError(str(error)) from error


def _device(given: Mapping[str, Given]) -> str:
    chosen = given["device"].value if "device" in given else "auto"
    return "cpu" if chosen == "cpu" or (chosen == "auto" and not has_driver()) else "cuda"
