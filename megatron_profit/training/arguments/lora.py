"""The flags of adapters (LoRA). Help reads them without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from checkpoint_conversion.adapters.options import ALL_LINEAR, LoraOptions, projections, resolved
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import Config, family_for
from megatron_profit.flags import ArgumentsError, flag, flag_of, options_of

# ProFit's code trains its adapters with this alpha.
_ALPHA_OF_RANK = 2
# Flags under which a layer is computed without its own module, so that an adapter would be left out.
_WITHOUT_MODULES = ("use_transformer_engine_op_fuser", "moe_shared_expert_overlap")


@dataclass(frozen=True)
class LoraFlags:
    """The flags of adapters; all but the first need it."""

    lora_rank: int | None = flag(
        "Freeze the weights and train low-rank adapters (LoRA) of this rank.", type=int, metavar="R"
    )
    lora_alpha: float | None = flag(
        "Scale the adapters' outputs by A / R; by default A is twice the rank.",
        type=float,
        metavar="A",
    )
    lora_dropout: float | None = flag(
        "Share of the adapters' inputs that training drops; by default 0.", type=float, metavar="P"
    )
    lora_targets: tuple[str, ...] | None = flag(
        "Projections that get an adapter, by their HuggingFace names (q_proj, k_proj, v_proj, o_proj, "
        f"gate_proj, up_proj, down_proj); by default {ALL_LINEAR}: all of them, in experts too.",
        nargs="+",
        metavar="NAME",
    )
    lora_rslora: bool = flag(
        "Scale the adapters' outputs by A / sqrt(R) in place of A / R.",
        default=False,
        action="store_true",
    )
    lora_adapter: str | None = flag(
        "PEFT folder whose adapters a new run starts from; the other flags must be as there.",
        metavar="DIR",
    )
    export_adapter: str | None = flag(
        "PEFT folder to write after the last step; --export-hf writes merged weights.",
        metavar="DIR",
    )


def lora_options(values: Mapping[str, Any], config: Config) -> LoraOptions | None:
    """Return the adapters that the flags ask for; None without `--lora-rank`.

    Args:
        values: All arguments by name.
        config: The content of config.json.

    Raises:
        ArgumentsError: A flag is ignored without `--lora-rank`, contradicts another one or is out of range, a
            target matches no projection, or the rank is too large.
    """
    flags = options_of(LoraFlags, values)
    if flags.lora_rank is None:
        for name in (option.name for option in fields(LoraFlags)):
            if values[name] is not None and values[name] is not False:
                raise ArgumentsError(
                    f"{flag_of(name)} is for adapters; give --lora-rank too, or drop it"
                )
        return None
    for name in _WITHOUT_MODULES:
        if values[name]:
            raise ArgumentsError(f"{flag_of(name)} leaves adapters out; drop it, or --lora-rank")
    if values["tp_comm_overlap"] and values["tp_comm_bulk_wgrad"]:
        raise ArgumentsError(
            "--tp-comm-overlap sums an input's gradient while the weight's is computed; with --lora-rank the "
            "weights have none, so the sum would be left out; give --disable-tp-comm-bulk-wgrad, or drop it"
        )
    alpha = _ALPHA_OF_RANK * flags.lora_rank if flags.lora_alpha is None else flags.lora_alpha
    targets = tuple(flags.lora_targets or (ALL_LINEAR,))
    try:
        options = LoraOptions(
            flags.lora_rank, alpha, targets, flags.lora_dropout or 0.0, flags.lora_rslora
        )
        options = resolved(family_for(config).tensor_rules(config), options)
    except ConversionError as error:
        raise ArgumentsError(f"--lora-rank {flags.lora_rank}: {error}") from error
    _check_experts(options, values, config)
    return options


def _check_experts(options: LoraOptions, values: Mapping[str, Any], config: Config) -> None:
    """Refuse adapters of experts alone where experts have process groups of their own.

    Megatron then has an optimizer without parameters for the rest of the model, and cannot save it.
    """
    ep, tp = values["expert_model_parallel_size"], values["tensor_model_parallel_size"]
    etp = values["expert_tensor_parallel_size"] or tp
    if (ep == 1 and etp == tp) or not values["save"]:
        return
    made = projections(family_for(config).tensor_rules(config), options)
    if all("expert" in projection.a.axes for projection in made):
        kind = "model" if ep > 1 else "tensor"
        name = f"expert_{kind}_parallel_size"
        raise ArgumentsError(
            f"--lora-targets {' '.join(options.targets)} gives adapters to experts alone, and with "
            f"{flag_of(name)} {values[name]} Megatron cannot save their optimizer; add a projection of the "
            f"attention, for example q_proj, or drop {flag_of(name)}, or --save"
        )


def active_parameters(options: LoraOptions, values: Mapping[str, Any], config: Config) -> int:
    """Return the adapters' parameters that a token meets: of experts, only the ones it is sent to."""
    total = 0.0
    for projection in projections(family_for(config).tensor_rules(config), options):
        size = options.rank * sum(projection.shape) * math.prod(projection.a.stack)
        experts = projection.a.axes.get("expert")
        total += size if experts is None else size * values["moe_router_topk"] / experts
    return round(total)
