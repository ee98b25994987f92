"""HuggingFace -> Megatron: what is in the checkpoint, against formulas of its own."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conversion_helpers import (
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    VOCABULARY,
    assert_equal,
    expected_megatron,
    read_hf,
    read_megatron,
    read_object,
)
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoint_conversion import hf_to_megatron as command
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.chunks import chunks_of
from checkpoint_conversion.hf_to_megatron import hf_to_megatron


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_tensors_are_those_of_the_formula(make_qwen3, tmp_path, tied, dtype, shard_size):
    hf = make_qwen3(tied=tied, dtype=dtype, shard_size=shard_size)
    hf_to_megatron(hf, tmp_path / "out")
    tensors, _ = read_megatron(tmp_path / "out" / "release")
    assert_equal(tensors, expected_megatron(read_hf(hf), tied))


def test_small_chunks_in_several_files_hold_the_same(qwen3, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "chunks_of", functools.partial(chunks_of, limit=5000))
    monkeypatch.setattr("checkpoint_conversion.torch_dist.writer._LEAST_FILE_BYTES", 100_000)
    hf_to_megatron(qwen3, tmp_path / "out")
    assert len(list((tmp_path / "out" / "release").glob("*.distcp"))) > 3
    tensors, _ = read_megatron(tmp_path / "out" / "release")
    assert_equal(tensors, expected_megatron(read_hf(qwen3)))


def test_one_chunk_per_layer(qwen3, tmp_path):
    hf_to_megatron(qwen3, tmp_path / "out")
    metadata = dcp.FileSystemReader(tmp_path / "out" / "release").read_metadata()
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            stacked = key.startswith("decoder.layers.")
            assert len(entry.chunks) == (LAYERS if stacked else 1), key


def test_entries_beside_the_tensors(qwen3, tmp_path):
    out = tmp_path / "out"
    hf_to_megatron(qwen3, out)
    assert sorted(entry.name for entry in out.iterdir()) == [
        ".checkpoint_conversion.json",
        "latest_checkpointed_iteration.txt",
        "release",
    ]
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert json.loads((out / "release" / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
    }
    _, objects = read_megatron(out / "release")
    modules = [
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "self_attention.q_layernorm",
        "self_attention.k_layernorm",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    ]
    states = {
        f"decoder.layers.{module}._extra_state/shard_{layer}_{LAYERS}"
        for module in modules
        for layer in range(LAYERS)
    } | {"decoder.final_layernorm._extra_state/shard_0_1"}
    assert objects == states | {"common_state/shard_0_1"}
    for key in states:
        assert read_object(out / "release", key) == [None]


def test_saved_arguments(qwen3, tmp_path):
    hf_to_megatron(qwen3, tmp_path / "out")
    (common,) = read_object(tmp_path / "out" / "release", "common_state/shard_0_1")
    assert common["checkpoint_version"] == 3.0
    assert common["iteration"] == 0
    assert common["content_metadata"]["singleton_local_shards"] is False
    args = common["args"]
    assert (args.num_layers, args.hidden_size, args.kv_channels) == (LAYERS, HIDDEN, HEAD_DIM)
    assert (args.rotary_base, args.padded_vocab_size) == (500000, VOCABULARY)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_dtype_option_rounds_like_torch(qwen3, tmp_path, dtype):
    target = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    hf_to_megatron(qwen3, tmp_path / "out", dtype=dtype)
    tensors, _ = read_megatron(tmp_path / "out" / "release")
    expected = expected_megatron(read_hf(qwen3))
    assert_equal(tensors, {key: tensor.to(target) for key, tensor in expected.items()})


def test_equal_inputs_give_equal_files(qwen3, tmp_path):
    for name in ("one", "two"):
        hf_to_megatron(qwen3, tmp_path / name)
    for file in (tmp_path / "one" / "release").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / "release" / file.name).read_bytes()


def test_dry_run_prints_everything_and_writes_nothing(qwen3, tmp_path, run_command):
    before = sorted(tmp_path.iterdir())
    result = run_command("hf_to_megatron", "--hf", qwen3, "--out", tmp_path / "out", "--dry-run")
    assert result.code == 0
    assert sorted(tmp_path.iterdir()) == before
    for name, tensor in read_hf(qwen3).items():
        line = next(line for line in result.out.splitlines() if line.startswith(name + " "))
        assert str(list(tensor.shape)) in line
        assert line.endswith(str(tensor.nbytes))
    assert "36 tensors -> 11 tensors, 778240 bytes" in result.out


def test_dry_run_shows_the_chosen_dtype(qwen3, tmp_path, run_command):
    arguments = ("--hf", qwen3, "--out", tmp_path / "out", "--dry-run", "--dtype", "bf16")
    result = run_command("hf_to_megatron", *arguments)
    assert "F32 -> BF16" in result.out
    assert "389120 bytes" in result.out


def test_command_says_what_it_did(qwen3, tmp_path, run_command):
    result = run_command("hf_to_megatron", "--hf", qwen3, "--out", tmp_path / "out")
    assert result.code == 0
    assert "11/11 tensors, 778 kB of 778 kB" in result.err
    assert f"--hf-model {qwen3} --pretrained-checkpoint {tmp_path / 'out'}" in result.out


def test_an_output_is_replaced_only_when_asked(make_qwen3, tmp_path):
    first, second, out = make_qwen3("a"), make_qwen3("bb"), tmp_path / "out"
    hf_to_megatron(first, out)
    with pytest.raises(ConversionError, match="--overwrite"):
        hf_to_megatron(second, out)
    assert_equal(read_megatron(out / "release")[0], expected_megatron(read_hf(first)))
    hf_to_megatron(second, out, overwrite=True)
    assert_equal(read_megatron(out / "release")[0], expected_megatron(read_hf(second)))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "bb", "out"]


def test_overwrite_spares_what_is_no_earlier_output(qwen3, tmp_path):
    out = tmp_path / "out"
    hf_to_megatron(qwen3, out)
    (out / "iter_0000010").mkdir()
    with pytest.raises(ConversionError, match="iter_0000010"):
        hf_to_megatron(qwen3, out, overwrite=True)
    assert (out / "iter_0000010").is_dir()


def test_an_empty_output_folder_is_used(qwen3, tmp_path):
    (tmp_path / "out").mkdir()
    hf_to_megatron(qwen3, tmp_path / "out")
    assert (tmp_path / "out" / "release").is_dir()


def test_the_input_is_never_replaced(qwen3, tmp_path):
    for out in (qwen3, tmp_path):
        with pytest.raises(ConversionError, match="holds an input"):
            hf_to_megatron(qwen3, out, overwrite=True)


def test_a_copied_lm_head_beside_tied_embeddings(make_qwen3, tmp_path):
    from safetensors.torch import save_file

    hf = make_qwen3(tied=True)
    tensors = load_file(hf / "model.safetensors")
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": copy}, hf / "model.safetensors")
    hf_to_megatron(hf, tmp_path / "out")
    assert "output_layer.weight" not in read_megatron(tmp_path / "out" / "release")[0]

    copy[400, 3] += 1
    save_file({**tensors, "lm_head.weight": copy}, hf / "model.safetensors")
    with pytest.raises(ConversionError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        hf_to_megatron(hf, tmp_path / "out", overwrite=True)


def test_too_little_space_is_noticed_first(qwen3, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10**6))
    with pytest.raises(ConversionError, match="1 MB free"):
        hf_to_megatron(qwen3, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()
