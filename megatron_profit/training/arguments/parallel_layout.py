"""Checks of the parallel layout: whether the model, the batch and the rows can be split as the flags say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_profit.flags import ArgumentsError, flag_of

# Flags that say by themselves which layers a pipeline rank has.
_OWN_SPLITS = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)


def check_layout(settings: Mapping[str, Any], world_size: int) -> int:
    """Refuse a parallel layout that does not fit the model or the number of processes. For example, 12
    attention heads cannot be split over 8 tensor-parallel ranks.

    Returns:
        The data-parallel size.
    """
    tp, pp, cp = (
        settings[f"{kind}_parallel_size"] for kind in ("tensor_model", "pipeline_model", "context")
    )
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        _check_divides("--tensor-model-parallel-size", tp, f"the model's {name}", settings[name])
    if settings["experimental_attention_variant"] == "gated_delta_net":
        _check_delta_net_heads(settings, tp, cp)
    _check_pipeline(settings, pp)
    if world_size == 1 < tp * pp * cp:
        raise ArgumentsError(
            f"tensor x pipeline x context parallel size is {tp * pp * cp}, and there is one process; start "
            f"{tp * pp * cp} of them with torchrun: torchrun --nproc-per-node {tp * pp * cp} -m "
            "megatron_profit.sft …"
        )
    _check_divides(
        "tensor x pipeline x context parallel size"
        if cp > 1
        else "tensor x pipeline parallel size",
        tp * pp * cp,
        "the number of processes",
        world_size,
    )
    data_parallel = world_size // (tp * pp * cp)
    for batch, micro in (
        ("global_batch_size", "micro_batch_size"),
        ("eval_global_batch_size", "eval_micro_batch_size"),
    ):
        if settings[batch] is not None:
            micro_size = settings[micro] or settings["micro_batch_size"]
            _check_divides(
                f"{flag_of(micro)} x data-parallel size",
                micro_size * data_parallel,
                flag_of(batch),
                settings[batch],
            )
    _check_micro_batches(settings, pp, data_parallel)
    limit = settings["max_position_embeddings"]
    if not 0 < settings["seq_length"] <= limit:
        raise ArgumentsError(
            f"--seq-length {settings['seq_length']} is outside 1..{limit}, the model's positions "
            "(max_position_embeddings)"
        )
    _check_split_of_rows(settings, tp, cp)
    return data_parallel


def _check_delta_net_heads(settings: Mapping[str, Any], tp: int, cp: int) -> None:
    """Refuse ranks that cannot share the heads of Gated DeltaNet layers, which context parallelism splits
    too.
    """
    what = "tensor x context parallel size" if cp > 1 else "--tensor-model-parallel-size"
    for name in ("linear_num_key_heads", "linear_num_value_heads"):
        _check_divides(what, tp * cp, f"the model's {name}", settings[name])


def _check_split_of_rows(settings: Mapping[str, Any], tp: int, cp: int) -> None:
    """Refuse rows that sequence and context parallelism cannot split evenly."""
    seq_length = settings["seq_length"]
    parts = 2 * cp if cp > 1 else 1
    if seq_length % parts:
        raise ArgumentsError(
            f"--seq-length {seq_length} is not a multiple of {parts}: with --context-parallel-size {cp} each "
            "rank holds two equal chunks of a row"
        )
    if settings["sequence_parallel"]:
        _check_divides(
            "--sequence-parallel with tensor parallel size",
            tp,
            "--seq-length" if cp == 1 else f"the positions of one of {cp} context-parallel ranks",
            seq_length // cp,
        )
    gathers = settings["packing"] or settings["transformer_impl"] == "local"
    if cp > 1 and gathers and settings["cp_comm_type"] not in (["p2p"], ["all_gather"]):
        raise ArgumentsError(
            f"--cp-comm-type {' '.join(settings['cp_comm_type'])} needs Transformer Engine and rows that "
            "are not packed; otherwise keys and values are gathered: drop the flag"
        )


def _check_pipeline(settings: Mapping[str, Any], pp: int) -> None:
    """Refuse layers that do not split evenly, where the flags do not say how they split."""
    if any(settings[name] for name in _OWN_SPLITS):
        return
    ends = _counted_ends(settings)
    layers = settings["num_layers"] + len(ends)
    what = " and ".join(["the model's num_layers", *ends])
    _check_divides("--pipeline-model-parallel-size", pp, what, layers)
    for name in ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"):
        if settings[name]:
            of = "the layers of a pipeline rank"
            _check_divides(flag_of(name), settings[name], of, layers // pp)


def _counted_ends(settings: Mapping[str, Any]) -> list[str]:
    """Return the ends of the model that count as a layer in the split over pipeline ranks."""
    ends = ("embedding", "loss")
    return [end for end in ends if settings[f"account_for_{end}_in_pipeline_split"]]


def _check_micro_batches(settings: Mapping[str, Any], pp: int, data_parallel: int) -> None:
    """Refuse steps and evaluations of too few micro-batches, which a virtual pipeline takes in groups."""
    stages = settings["num_virtual_stages_per_pipeline_rank"]
    if per_stage := settings["num_layers_per_virtual_pipeline_stage"]:
        stages = (settings["num_layers"] + len(_counted_ends(settings))) // (pp * per_stage)
    if pp == 1 or (stages or 1) == 1 or any(settings[name] for name in _OWN_SPLITS):
        return
    group = settings["microbatch_group_size_per_vp_stage"] or pp
    sizes = {}
    if not (settings["step_batch_size_schedule"] or settings["skip_train"]):
        sizes["--global-batch-size"] = settings["global_batch_size"], settings["micro_batch_size"]
    if settings["eval_iters"] and (settings["valid_data"] or settings["valid_split"]):
        sizes["--eval-global-batch-size"] = (
            settings["eval_global_batch_size"] or settings["global_batch_size"],
            settings["eval_micro_batch_size"] or settings["micro_batch_size"],
        )
    for flag, (batch, micro) in sizes.items():
        # Without a size Megatron takes a step of one micro-batch on each rank.
        rows = micro * data_parallel
        count = (batch or settings["micro_batch_size"] * data_parallel) // rows
        if count < group or 0 < count % group < pp:
            raise ArgumentsError(
                f"{flag} {count * rows} is {count} micro-batches, and a virtual pipeline takes them in "
                f"groups of {group}; give {math.ceil(count / group) * group * rows}"
            )


def _check_divides(what: str, size: int, of: str, total: int) -> None:
    if size < 1 or total % size:
        small = [d for d in range(1, math.isqrt(total) + 1) if total % d == 0]
        allowed = sorted({*small, *(total // d for d in small)})
        raise ArgumentsError(
            f"{what} {size} does not divide {of} {total}; it can be {_listed(allowed)}"
        )


def _listed(values: list[int]) -> str:
    shown = values if len(values) <= 12 else [*values[:11], "...", values[-1]]
    return ", ".join(map(str, shown))
