"""Megatron arguments that the device and the installed libraries decide, and the start by torchrun."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_profit.flags import ArgumentsError

# The driver's traces; without one of them there is no need to ask torch, which takes seconds.
_DRIVER = (Path("/proc/driver/nvidia"), Path("/dev/nvidiactl"), Path("/dev/dxg"))
# Settings that Megatron's local layers need to run without Transformer Engine and Apex.
_LOCAL_LAYERS = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    # The norms before linear layers would give them fp32, and their weights are of half precision.
    "fp32_residual_connection": False,
}
_CPU = {
    "distributed_backend": "gloo",
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
}


def has_driver() -> bool:
    """Return whether this machine has the driver of a GPU."""
    return any(path.exists() for path in _DRIVER)


def platform_settings(device: str, local: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return Megatron arguments that the device and the installed libraries decide.

    Args:
        device: "cuda" or "cpu".
        local: Whether the local layers were asked for although Transformer Engine may be there.

    Returns:
        The required values, and the values that a flag may change.
    """
    if device == "cpu":
        # Loading rows takes very little time compared with training, and its processes would share the cores.
        return {**_LOCAL_LAYERS, **_CPU, "gradient_accumulation_fusion": False}, {"num_workers": 0}
    # The output layer is Megatron's own in any case, and its fusion comes from Apex.
    fusion = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    suggested = {"gradient_accumulation_fusion": fusion}
    if local or importlib.util.find_spec("transformer_engine") is None:
        return dict(_LOCAL_LAYERS), suggested
    return {}, suggested


def check_restarts() -> None:
    """Refuse restarts on several nodes where torchrun shares its own store with the ranks.

    The ranks tell the attempts in that store apart by the number of restarts (`store-of-each-attempt`). But a
    node that starts again because another one has lost a rank does not count it, so they would not meet.

    Raises:
        ArgumentsError: Names the variable that ends the sharing.
    """
    shares = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    own, all_ranks = (os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if shares and own != all_ranks and restarts != "0":
        raise ArgumentsError(
            f"torchrun's --max-restarts {restarts} on several nodes needs "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun on each node: without it "
            "ranks do not find each other after a restart; set it, or give torchrun --max-restarts 0"
        )


def check_kernels(values: Mapping[str, Any], device: str) -> None:
    """Refuse a model whose kernels are not installed, unless plain torch was asked for.

    Args:
        values: All arguments by name.
        device: "cuda" or "cpu".

    Raises:
        ArgumentsError: The model has Gated DeltaNet layers, and flash-linear-attention is missing on a GPU.
    """
    has_delta_net = values["experimental_attention_variant"] == "gated_delta_net"
    plain = device == "cpu" or values["transformer_impl"] == "local"
    if has_delta_net and not plain and importlib.util.find_spec("fla") is None:
        raise ArgumentsError(
            "the model has Gated DeltaNet layers, and flash-linear-attention, which has their kernels, is "
            "not installed; pip install flash-linear-attention, or give --transformer-impl local, which "
            "computes all layers in plain torch and takes longer"
        )
