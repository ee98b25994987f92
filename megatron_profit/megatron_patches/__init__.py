"""The only place where Megatron-Core or PyTorch is changed.

`activate()` is the first function that a training process calls, before it imports Megatron.
"""

from __future__ import annotations

import importlib.util
import os
import sys

from megatron_profit.megatron_patches.patch import (
    Patch,
    applied_patches,
    apply_patches,
    check_upstream,
)

DEVICES = ("auto", "cpu", "cuda")

__all__ = ["DEVICES", "Patch", "activate", "active_device", "all_patches", "applied_patches"]

_active: str | None = None


def active_device() -> str | None:
    """Return the device that `activate` chose in this process ("cpu" or "cuda"), or None before it was
    called.
    """
    return _active


def activate(device: str = "auto") -> str:
    """Choose the device and make Megatron-Core run on it. Call it before importing `megatron`.

    Args:
        device: "cuda", "cpu", or "auto" (CUDA where there is a GPU, else the CPU).

    Returns:
        The device in use, "cuda" or "cpu".

    Raises:
        ValueError: For an unknown device, or "cuda" on a machine without a GPU.
        UnsupportedVersionError: Megatron-Core or torch is missing, or differs where a patch changes it.
        RuntimeError: When another device is active already, or Megatron was imported before.
    """
    global _active
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; choose one of {', '.join(DEVICES)}")
    if _active is not None:
        if device in ("auto", _active):
            return _active
        raise RuntimeError(
            f"the {_active} backend is active already; {device!r} needs a new process"
        )
    chosen = _available(device)
    patches = _patches_for(chosen)
    for notice in check_upstream(patches):
        _print_notice(notice)
    if chosen == "cpu":
        if "megatron.core" in sys.modules:
            raise RuntimeError(
                "megatron was imported before the CPU backend was activated; call "
                "megatron_profit.megatron_patches.activate() first"
            )
        _print_notice(
            "CPU backend: Megatron runs on the CPU under gloo. This is for learning, debugging and tests; "
            "train on GPUs."
        )
    else:
        _keep_to_the_cudnn_of_torch()
    apply_patches(patches)
    _active = chosen
    return chosen


def _available(device: str) -> str:
    """Return "cuda" or "cpu" for a device of the machine, or for "auto"."""
    import torch

    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ValueError("device 'cuda' was asked for, but torch sees no GPU; use 'cpu' or 'auto'")
    return "cuda" if has_gpu and device != "cpu" else "cpu"


def all_patches() -> tuple[Patch, ...]:
    """Return every patch that the project has, for the documentation and for tests."""
    return _patches_for("cpu")


def _patches_for(device: str) -> tuple[Patch, ...]:
    """Return the patches for a device in their order: the CPU backend's come first."""
    from megatron_profit.megatron_patches import elastic, megatron

    shared = (*elastic.TORCH_PATCHES, *megatron.MEGATRON_PATCHES)
    if device != "cpu":
        return shared

    from megatron_profit.megatron_patches import cpu

    return (*cpu.TORCH_PATCHES, *cpu.MEGATRON_PATCHES, *shared)


def _keep_to_the_cudnn_of_torch() -> None:
    """Load the cuDNN that torch was installed with.

    Transformer Engine prefers a cuDNN of the system. With both in a process it has no attention kernel
    (transformer_engine/common/__init__.py).
    """
    if "CUDNN_HOME" in os.environ or "CUDNN_PATH" in os.environ:
        return
    try:
        package = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return
    if package is not None and package.submodule_search_locations:
        os.environ["CUDNN_HOME"] = package.submodule_search_locations[0]


def _print_notice(notice: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"megatron_profit: {notice}", flush=True)
