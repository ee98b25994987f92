"""The flags of models with experts, and the layouts that fit them. Flags are read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_profit.flags import ArgumentsError

# Arguments that follow from config.json and are choices of training nevertheless.
CHOICES = frozenset({"moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_router_dtype"})
# Flags of experts, routers and shared experts that no family of this project has, or that `moe_layer_freq`
# and similar arguments give where one has experts. They mean other weights or another function of them.
ARCHITECTURE = (
    *("num_experts", "moe_layer_freq", "moe_ffn_hidden_size", "moe_latent_size"),
    *("moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax"),
    *("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor"),
    *("moe_router_enable_expert_bias", "moe_apply_probs_on_input", "moe_use_upcycling"),
    *(
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_gate",
        "moe_mlp_glu_interleave_size",
        "moe_shared_expert_glu_interleave_size",
    ),
    *("moe_router_force_load_balancing", "moe_router_force_biased"),
)
_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")


def expert_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return defaults that a flag may change.

    Tokens go to their experts alone. Where Transformer Engine is installed, all experts of a rank are
    computed together.
    """
    if settings["num_experts"] is None:
        return {}
    grouped = settings["transformer_impl"] == "transformer_engine"
    return {"moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": grouped}


def check_experts(settings: Mapping[str, Any], normalization: str, world_size: int) -> None:
    """Check the flags of a model with experts, and that one without has no such flags.

    Args:
        settings: All arguments by name.
        normalization: The divisor of the objective's loss, "supervised" or "kept".
        world_size: Number of processes.

    Raises:
        ArgumentsError: The layout does not fit the experts or the processes, or a flag would be ignored or
            does harm.
    """
    ep, experts = settings["expert_model_parallel_size"], settings["num_experts"]
    etp = settings["expert_tensor_parallel_size"]
    if experts is None:
        for name, size in (("model", ep), ("tensor", etp)):
            if size not in (None, 1):
                raise ArgumentsError(
                    f"--expert-{name}-parallel-size {size}: the model has no experts"
                )
        return
    tp, pp = settings["tensor_model_parallel_size"], settings["pipeline_model_parallel_size"]
    if tp > 1 and not settings["sequence_parallel"]:
        raise ArgumentsError(
            f"--tensor-model-parallel-size {tp} needs --sequence-parallel where a model has experts: "
            "without it every rank would route all tokens"
        )
    etp = tp if etp is None else etp
    for flag, size, of, total in (
        ("--expert-model-parallel-size", ep, "the model's experts", experts),
        ("--expert-tensor-parallel-size", etp, "an expert's size", settings["moe_ffn_hidden_size"]),
        (
            "expert model x tensor parallel size",
            ep * etp,
            "a pipeline stage's ranks",
            world_size // pp,
        ),
    ):
        if size < 1 or total % size:
            raise ArgumentsError(f"{flag} {size} does not divide {of}, {total}")
    if settings["moe_grouped_gemm"] and settings["transformer_impl"] == "local":
        raise ArgumentsError("--moe-grouped-gemm needs Transformer Engine; drop the flag")
    _check_balancing(settings, normalization)


def _check_balancing(settings: Mapping[str, Any], normalization: str) -> None:
    kinds, coefficients = (
        value if isinstance(value, list) else [value]
        for value in (settings["moe_router_load_balancing_type"], settings["moe_aux_loss_coeff"])
    )
    for kind in kinds:
        if kind not in _BALANCING:
            raise ArgumentsError(
                f"--moe-router-load-balancing-type {kind} routes otherwise than the model was trained "
                f"to; it can be {', '.join(_BALANCING)}"
            )
    losses = {}
    if kinds != ["none"]:
        losses["--moe-aux-loss-coeff"] = next(filter(None, coefficients), 0)
    losses["--moe-z-loss-coeff"] = settings["moe_z_loss_coeff"]
    for flag, coefficient in losses.items():
        if normalization == "kept" and coefficient:
            raise ArgumentsError(
                f"{flag} {coefficient}: where the loss is divided by the kept tokens, the objective would "
                "decide how much this loss of the router weighs; use --objective-normalization supervised, "
                f"or {flag} 0"
            )
