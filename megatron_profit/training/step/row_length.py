"""The length of the rows of a micro-batch.

Rows of one record each (`--no-packing`) are mostly padding where records are shorter than `--seq-length`.
They are cut after the longest record of their micro-batch, unless the layout needs rows of one length. For
example, records of 700 and 1,200 tokens in rows of 4,096 need rows of 1,216 at a multiple of 64. Only
padding is cut, so losses and gradients stay the same.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping

from torch import Tensor

# Kernels are chosen and compiled for each length of a row: this leaves few lengths.
_MULTIPLE = 64
# The coarsest blocks that FP8 and FP4 recipes scale, on each rank.
_QUANTIZED_MULTIPLE = 128


def row_multiple(args: Namespace) -> int | None:
    """Return the number that the length of a cut row is a multiple of; None where rows keep `--seq-length`.

    Args:
        args: Megatron's arguments, validated.
    """
    if args.packing or why_full_rows(args) is not None:
        return None
    cp = args.context_parallel_size
    tp = args.tensor_model_parallel_size if args.sequence_parallel else 1
    if args.fp8 or args.fp4:
        return _QUANTIZED_MULTIPLE * cp * tp
    # Context parallelism splits a row into 2 x CP chunks, sequence parallelism a rank's part into TP.
    return math.lcm(_MULTIPLE, 2 * cp, cp * tp)


def stages_exchange_lengths(args: Namespace) -> bool:
    """Return Megatron's `variable_seq_lengths`.

    It says whether pipeline stages exchange the length of a micro-batch before they send it.
    """
    return args.pipeline_model_parallel_size > 1 and row_multiple(args) is not None


def length_of_rows(args: Namespace) -> str:
    """Say how long the rows are that hold one record each."""
    if (flag := why_full_rows(args)) is not None:
        return (
            f"rows keep all {args.seq_length:,} positions, also those after their record, because {flag} "
            "needs rows of one length"
        )
    return (
        "rows are cut after the longest record of their micro-batch, to a multiple of "
        f"{row_multiple(args)} positions"
    )


def why_full_rows(args: Namespace) -> str | None:
    """Return the flag that needs all rows to be of one length, None where rows may differ."""
    reasons = {
        f"--cuda-graph-impl {args.cuda_graph_impl}": args.cuda_graph_impl != "none",
        "--tp-comm-overlap": args.tp_comm_overlap,
        "--fine-grained-activation-offloading": args.fine_grained_activation_offloading,
        "--overlap-p2p-communication-warmup-flush": args.overlap_p2p_comm_warmup_flush,
    }
    if args.num_experts is not None:
        # These give each rank of an expert-parallel group as much room as the others.
        dispatcher = args.moe_token_dispatcher_type
        reasons |= {
            f"--moe-token-dispatcher-type {dispatcher}": dispatcher != "alltoall",
            "--moe-expert-capacity-factor": args.moe_expert_capacity_factor is not None,
            "--moe-paged-stash": args.moe_paged_stash,
        }
    return next((flag for flag, is_given in reasons.items() if is_given), None)


def cut_rows(rows: Mapping[str, Tensor], multiple: int) -> dict[str, Tensor]:
    """Leave out positions after the longest record.

    Args:
        rows: Tensors [B, S] of `SFTDataset`, collated.
        multiple: See `row_multiple`.

    Returns:
        The tensors as [B, L]. L is a multiple of `multiple`, or S where that is less.
    """
    used = (rows["example_index"] >= 0).any(0).nonzero()
    longest = int(used[-1]) + 1 if len(used) else 1
    length = min(math.ceil(longest / multiple) * multiple, rows["example_index"].size(1))
    return {name: values[:, :length].contiguous() for name, values in rows.items()}
