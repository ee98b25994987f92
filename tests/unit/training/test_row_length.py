"""Rows of one record each are cut where the layout allows it, and keep every label."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import numpy as np
import pytest
import torch
from megatron.training.arguments import add_megatron_arguments
from torch.utils.data import default_collate

from megatron_profit.data import Examples, SFTDataset
from megatron_profit.training.arguments.command_line import add_arguments
from megatron_profit.training.step.row_length import (
    cut_rows,
    length_of_rows,
    row_multiple,
    stages_exchange_lengths,
)

SEQ_LENGTH = 512
# What a parser of config.json and the flags would add for a model with experts.
EXPERTS = {"num_experts": 8, "moe_token_dispatcher_type": "alltoall"}


@pytest.fixture(scope="module")
def parse():
    """parse(flags): Megatron's arguments by name, unpacked rows unless the flags say otherwise."""
    parser = add_megatron_arguments(add_arguments(ArgumentParser(allow_abbrev=False)))

    def run(flags: str, **changes: object) -> Namespace:
        args = parser.parse_args(["--no-packing", "--seq-length", str(SEQ_LENGTH), *flags.split()])
        return Namespace(**{**vars(args), **changes})

    return run


def rows_of(lengths: list[int], size: int) -> dict[str, torch.Tensor]:
    """A micro-batch of `size` rows whose records take these many positions; the last rows are empty."""
    offsets = np.concatenate([[0], np.cumsum(np.array(lengths) + 1)]).astype(np.int64)
    ids = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    examples = Examples(ids, np.ones(len(ids), np.uint8), offsets)
    data = SFTDataset(examples, SEQ_LENGTH, size, shuffle=False, epochs=1)
    return default_collate([data[i] for i in range(size)])


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([5, 64, 3], 64),
        ([65], 128),
        ([1], 64),
        ([SEQ_LENGTH, 7], SEQ_LENGTH),
        ([SEQ_LENGTH - 3], SEQ_LENGTH),
    ],
)
@pytest.mark.parametrize("empty", [0, 2])
def test_rows_end_at_the_next_multiple_after_the_longest_record(lengths, expected, empty):
    whole = rows_of(lengths, len(lengths) + empty)
    cut = cut_rows(whole, 64)
    assert cut.keys() == whole.keys()
    for name, values in cut.items():
        assert values.shape == (len(lengths) + empty, expected)
        assert values.is_contiguous()
        assert torch.equal(values, whole[name][:, :expected])
    assert (cut["labels"] != -100).sum() == (whole["labels"] != -100).sum() == sum(lengths)


def test_rows_without_any_record_keep_one_multiple():
    cut = cut_rows(rows_of([3], 3), 64)
    empty = {name: values[1:] for name, values in cut.items()}
    assert cut_rows(empty, 64)["tokens"].shape == (2, 64)
    assert cut_rows(empty, 1)["tokens"].shape == (2, 1)


def test_a_row_is_never_longer_than_the_sequence_length():
    assert cut_rows(rows_of([500], 1), 384)["tokens"].shape == (1, SEQ_LENGTH)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--tensor-model-parallel-size 4",
        "--tensor-model-parallel-size 4 --sequence-parallel",
        "--tensor-model-parallel-size 3 --sequence-parallel",
        "--context-parallel-size 2",
        "--context-parallel-size 3",
        "--context-parallel-size 5 --tensor-model-parallel-size 6 --sequence-parallel",
        "--fp8-format hybrid --context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
    ],
)
def test_each_rank_gets_equal_parts_of_a_cut_row(parse, flags):
    args = parse(flags)
    multiple = row_multiple(args)
    cp = args.context_parallel_size
    tp = args.tensor_model_parallel_size if args.sequence_parallel else 1
    assert multiple % (2 * cp) == multiple % (cp * tp) == multiple % 64 == 0
    if args.fp8:
        assert multiple // (cp * tp) % 128 == 0
    assert f"a multiple of {multiple} positions" in length_of_rows(args)


@pytest.mark.parametrize(
    ("flags", "changes", "named"),
    [
        ("--cuda-graph-impl local", {}, "--cuda-graph-impl local"),
        ("--tp-comm-overlap", {}, "--tp-comm-overlap"),
        ("--fine-grained-activation-offloading", {}, "--fine-grained-activation-offloading"),
        (
            "--overlap-p2p-communication-warmup-flush",
            {},
            "--overlap-p2p-communication-warmup-flush",
        ),
        (
            "--moe-token-dispatcher-type allgather",
            {"num_experts": 8},
            "--moe-token-dispatcher-type allgather",
        ),
        (
            "--moe-token-dispatcher-type flex",
            {"num_experts": 8},
            "--moe-token-dispatcher-type flex",
        ),
        ("--moe-expert-capacity-factor 1.5", EXPERTS, "--moe-expert-capacity-factor"),
        ("--moe-paged-stash", EXPERTS, "--moe-paged-stash"),
    ],
)
def test_rows_stay_whole_where_a_flag_needs_one_length(parse, flags, changes, named):
    args = parse(f"{flags} --pipeline-model-parallel-size 2", **changes)
    assert row_multiple(args) is None
    assert not stages_exchange_lengths(args)
    assert length_of_rows(args).startswith(f"rows keep all {SEQ_LENGTH} positions")
    assert f"because {named} needs rows of one length" in length_of_rows(args)


def test_packed_rows_stay_whole(parse):
    assert row_multiple(parse("--packing")) is None
    assert not stages_exchange_lengths(parse("--packing --pipeline-model-parallel-size 2"))


def test_experts_take_rows_of_any_length_from_each_rank(parse):
    assert row_multiple(parse("--expert-model-parallel-size 4", **EXPERTS)) == 64
    # allgather is the dispatcher's default, also for models without experts.
    assert row_multiple(parse("")) == 64


def test_pipeline_stages_exchange_the_lengths_of_cut_rows(parse):
    assert stages_exchange_lengths(parse("--pipeline-model-parallel-size 2"))
    assert not stages_exchange_lengths(parse(""))
