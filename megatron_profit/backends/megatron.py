"""Changes to Megatron-Core that are needed on every device."""

from __future__ import annotations

import functools
from typing import Any

from megatron_profit.backends.patch import MEGATRON_CORE_VERSION, Patch

_MEGATRON = f"megatron-core {MEGATRON_CORE_VERSION}"


def _skip_compilation_of_shipped_helpers() -> None:
    from megatron.core.datasets import utils

    original = utils.compile_helpers

    def compile_helpers() -> None:
        try:
            from megatron.core.datasets import helpers_cpp  # noqa: F401
        except ImportError:
            original()

    utils.compile_helpers = compile_helpers


def _begin_anew_after_the_first_line() -> None:
    from megatron.training import training
    from megatron.training.global_vars import get_args

    original = training.training_log

    @functools.wraps(original)
    def training_log(loss_dict: Any, total_loss_dict: dict, *args: Any, **kwargs: Any) -> Any:
        result = original(loss_dict, total_loss_dict, *args, **kwargs)
        if kwargs.get("is_first_iteration") and get_args().log_interval == 1:
            total_loss_dict.clear()
        return result

    training.training_log = training_log


MEGATRON_PATCHES = (
    Patch(
        name="shipped-dataset-helpers",
        upstream=_MEGATRON,
        file="megatron/core/datasets/utils.py",
        reason="initialize_megatron runs `make` in a folder that has no Makefile in the wheel, and "
        "exits; the compiled helpers_cpp is in the wheel, so nothing has to be compiled.",
        apply=_skip_compilation_of_shipped_helpers,
    ),
    Patch(
        name="first-log-line",
        upstream=_MEGATRON,
        file="megatron/training/training.py",
        reason="After the first step of a process, training_log keeps its sums, so that with "
        "--log-interval 1 the second line shows the mean of the first two steps.",
        apply=_begin_anew_after_the_first_line,
    ),
)
