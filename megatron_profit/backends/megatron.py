"""Changes to Megatron-Core that are needed on every device."""

from __future__ import annotations

from megatron_profit.backends.patch import MEGATRON_CORE_VERSION, Patch


def _skip_compilation_of_shipped_helpers() -> None:
    from megatron.core.datasets import utils

    original = utils.compile_helpers

    def compile_helpers() -> None:
        try:
            from megatron.core.datasets import helpers_cpp  # noqa: F401
        except ImportError:
            original()

    utils.compile_helpers = compile_helpers


MEGATRON_PATCHES = (
    Patch(
        name="shipped-dataset-helpers",
        upstream=f"megatron-core {MEGATRON_CORE_VERSION}",
        file="megatron/core/datasets/utils.py",
        reason="initialize_megatron runs `make` in a folder that has no Makefile in the wheel, and "
        "exits; the compiled helpers_cpp is in the wheel, so nothing has to be compiled.",
        apply=_skip_compilation_of_shipped_helpers,
    ),
)
