"""Blocks of Megatron tensors, read from and written to a HuggingFace folder without a checkpoint."""

from __future__ import annotations

import errno
import itertools
import os

import pytest
import torch
from conversion_helpers import VOCABULARY, expected_megatron, read_hf

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.folder import list_tensors
from checkpoint_conversion.hf.model import open_hf_model
from checkpoint_conversion.hf.output import plan_output
from checkpoint_conversion.hf.shards import Rules, Shard, read_shard, write_shard
from checkpoint_conversion.verify import verify

PADDING = 5


def cut(rule, rows, columns):
    """(offsets, shape) of blocks of at most these sizes, which cover the tensor; the vocabulary is
    padded."""
    height, *rest = rule.piece_shape
    height += PADDING if rule.vocabulary else 0
    for piece in rule.pieces():
        starts = [range(0, height, rows), *(range(0, size, columns) for size in rest)]
        for start in itertools.product(*starts):
            sizes = zip((rows, *[columns] * len(rest)), (height, *rest), start, strict=True)
            yield (*piece.index, *start), tuple(min(size, end - at) for size, end, at in sizes)


def global_shape(rule):
    return (
        *rule.stack,
        rule.piece_shape[0] + PADDING * rule.vocabulary,
        *rule.piece_shape[1:],
    )


@pytest.mark.parametrize(("rows", "columns"), [(1000, 1000), (37, 29), (1000, 11), (3, 1000)])
@pytest.mark.parametrize("tied", [False, True])
def test_blocks_of_any_shape_are_read_and_written(
    make_qwen3, tmp_path, monkeypatch, rows, columns, tied
):
    monkeypatch.setattr("checkpoint_conversion.hf.shards.CHUNK_BYTES", 5000)
    model = open_hf_model(make_qwen3(tied=tied, dtype=torch.bfloat16))
    rules = Rules(model.rules)
    expected = expected_megatron(read_hf(model.folder), tied)
    output = plan_output(tmp_path / "out", model.folder, torch.bfloat16)
    written = 0
    with output.create() as partial:
        tensors = list_tensors(partial)
        for rule in model.rules:
            whole = expected.pop(rule.megatron)
            for offsets, shape in cut(rule, rows, columns):
                values = torch.full(shape, torch.nan, dtype=torch.bfloat16)
                shard = Shard(rule.megatron, global_shape(rule), offsets, values)
                read_shard(model, rules, shard)
                stacked = len(rule.stack)
                window = zip(offsets[stacked:], shape, strict=True)
                block = whole[offsets[:stacked]][tuple(slice(at, at + n) for at, n in window)]
                assert torch.equal(values[: len(block)], block), (rule.megatron, offsets)
                assert not values[len(block) :].any()
                assert block.numel() == values.numel() or rule.vocabulary
                written += write_shard(tensors, rules, shard)
    assert not expected
    assert written == output.elements
    assert not verify(model.folder, tmp_path / "out").differences


def test_an_interrupted_export_leaves_nothing(qwen3, tmp_path):
    output = plan_output(tmp_path / "out", qwen3, torch.float32)
    with pytest.raises(OSError, match="full"), output.create():
        raise OSError("full")
    assert list(tmp_path.iterdir()) == [qwen3]


def test_a_disk_that_fills_up_is_named(qwen3, tmp_path, monkeypatch):
    model = open_hf_model(qwen3)
    rules = Rules(model.rules)
    output = plan_output(tmp_path / "out", qwen3, torch.float32)

    def pwrite(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def export():
        with output.create() as partial:
            tensors = list_tensors(partial)
            monkeypatch.setattr(os, "pwrite", pwrite)
            write_shard(tensors, rules, shard_of("output_layer.weight", (VOCABULARY, 64)))

    with pytest.raises(ConversionError, match=r"model\.safetensors: No space left on device while"):
        export()
    assert list(tmp_path.iterdir()) == [qwen3]


def shard_of(key, shape, dtype=torch.float32):
    return Shard(key, shape, (0,) * len(shape), torch.empty(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (shard_of("decoder.lora.weight", (2, 3)), r"decoder\.lora\.weight \[2, 3\]"),
        (shard_of("output_layer.weight", (VOCABULARY, 65)), r"\[507, 65\].*\[507, 64\]"),
        (shard_of("output_layer.weight", (VOCABULARY - 1, 64)), r"\[506, 64\]"),
    ],
)
def test_a_tensor_that_the_folder_does_not_give_is_named(qwen3, shard, message):
    model = open_hf_model(qwen3)
    with pytest.raises(ConversionError, match=message):
        read_shard(model, Rules(model.rules), shard)


def test_a_value_outside_the_range_of_the_dtype_is_named(make_qwen3):
    from safetensors.torch import load_file, save_file

    folder = make_qwen3()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = open_hf_model(folder)
    shard = shard_of("decoder.final_layernorm.weight", (64,), torch.float16)
    with pytest.raises(ConversionError, match=r"model\.norm\.weight holds 1e\+06"):
        read_shard(model, Rules(model.rules), shard)
