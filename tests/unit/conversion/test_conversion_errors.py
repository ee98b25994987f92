"""HuggingFace folders that cannot be converted: what is said, and that nothing is written."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch
from conversion_helpers import write_config
from safetensors.torch import load_file, save_file

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.megatron_to_hf import megatron_to_hf

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00009.safetensors", "model-00002-of-00009.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def _tensors(change, file="model.safetensors"):
    """A change to the tensors of a file."""

    def apply(folder):
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return apply


def _index(change):
    """A change to the index of a folder with shards."""

    def apply(folder):
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return apply


def _header(change):
    """A change to the header text of a file, at the same length."""

    def apply(folder):
        file = folder / "model.safetensors"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        text = change(data[8 : 8 + length].decode()).encode()
        assert len(text) == length
        file.write_bytes(data[:8] + text + data[8 + length :])

    return apply


def _cut(file, count):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:count])


def _shard_of(folder, name):
    return json.loads((folder / INDEX).read_text())["weight_map"][name]


def _move(folder):
    """The tensor lies in another shard than the index says."""
    shard = _shard_of(folder, Q_PROJ)
    other = next(file.name for file in folder.glob("*.safetensors") if file.name != shard)
    tensors = load_file(folder / shard)
    moved = tensors.pop(Q_PROJ)
    save_file(tensors, folder / shard)
    save_file({**load_file(folder / other), Q_PROJ: moved}, folder / other)


def _duplicate(folder):
    """The tensor lies in two shards."""
    shard = _shard_of(folder, Q_PROJ)
    other = max(file.name for file in folder.glob("*.safetensors") if file.name != shard)
    copy = load_file(folder / shard)[Q_PROJ]
    save_file({**load_file(folder / other), Q_PROJ: copy}, folder / other)


def _dangling(file):
    """A download of which a blob is missing."""

    def apply(folder):
        (folder / file).unlink()
        (folder / file).symlink_to("../../blobs/none")

    return apply


def _pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


SINGLE = {
    "no folder": (shutil.rmtree, "hf: no such folder; give a local"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: missing"),
    "broken config": (
        lambda f: (f / "config.json").write_text('{"a": 1'),
        r"config\.json: broken JSON",
    ),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "config says a key twice": (
        lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'),
        "'a' occurs twice",
    ),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "broken JSON"),
    "other architecture": (
        lambda f: write_config(f, lambda c: c.update(architectures=["GPT2LMHeadModel"])),
        "GPT2LMHeadModel",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "link to no weights": (
        _dangling("model.safetensors"),
        r"model\.safetensors is a link to .*blobs/none, which is missing; download",
    ),
    "pickled weights": (_pickled, r"pytorch_model\.bin.*save_pretrained"),
    "missing tensor": (_tensors(lambda t: t.pop(Q_PROJ)), rf"no tensor {Q_PROJ}"),
    "extra tensor": (
        _tensors(lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(96, 64)})),
        r"unknown tensor model\.layers\.3\.mlp\.up_proj\.weight",
    ),
    "bias": (
        _tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(128)})),
        r"unknown tensor .*q_proj\.bias",
    ),
    "wrong shape": (
        _tensors(lambda t: t.update({Q_PROJ: torch.ones(64, 128)})),
        rf"{Q_PROJ} has shape \[64, 128\]; config.json calls for \[128, 64\]",
    ),
    "vocabulary of another size": (
        lambda f: write_config(f, lambda c: c.update(vocab_size=512)),
        r"embed_tokens\.weight has shape \[507, 64\]; config.json calls for \[512, 64\]",
    ),
    "integers": (
        _tensors(lambda t: t.update({Q_PROJ: torch.ones(128, 64, dtype=torch.int8)})),
        rf"{Q_PROJ} is I8; supported: F32, BF16, F16",
    ),
    "dtypes of q and k differ": (
        _tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ].bfloat16()})),
        rf"{Q_PROJ} is BF16, but .* is F32.*--dtype",
    ),
    "empty file": (_cut("model.safetensors", 0), "truncated, or not a safetensors file"),
    "cut header": (_cut("model.safetensors", 500), "truncated, or not a safetensors file"),
    "cut data": (_cut("model.safetensors", -1), r"model\.safetensors: truncated: .* ends at byte"),
    "extra data": (
        lambda f: (f / "model.safetensors").open("ab").write(b"more"),
        "4 bytes more than its tensors need",
    ),
    "no JSON in the header": (_header(lambda text: "x" * len(text)), "broken JSON"),
    "unknown dtype": (_header(lambda text: text.replace('"F32"', '"Q32"', 1)), "malformed.*Q32"),
    "wrong offsets": (_header(lambda text: text.replace("[507,64]", "[507,65]", 1)), "wrong data"),
    "a tensor twice": (
        _header(
            lambda text: text.replace("layers.1.self_attn.q_proj", "layers.0.self_attn.q_proj")
        ),
        r"'model\.layers\.0\.self_attn\.q_proj\.weight' occurs twice",
    ),
    "stale index": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "does not refer to model.safetensors; remove whichever is stale",
    ),
    "stray shard": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        f"neither model.safetensors nor {INDEX}",
    ),
}
SHARDED = {
    "missing shard": (
        lambda f: (f / _shard_of(f, Q_PROJ)).unlink(),
        r"model-0000\d-of-0000\d.safetensors: missing",
    ),
    "link to no shard": (
        lambda f: _dangling(_shard_of(f, Q_PROJ))(f),
        r"safetensors: a link to .*blobs/none, which is missing; download",
    ),
    "truncated shard": (
        lambda f: _cut(_shard_of(f, Q_PROJ), -8)(f),
        r"model-0000\d-of-0000\d.safetensors: truncated",
    ),
    "tensor in another shard": (_move, rf"holds {Q_PROJ}; .* puts it in|{Q_PROJ} is missing"),
    "tensor in two shards": (_duplicate, rf"{Q_PROJ}"),
    "index lacks a tensor": (
        _index(lambda weight_map: weight_map.pop(Q_PROJ)),
        rf"holds {Q_PROJ}; {INDEX} puts it nowhere",
    ),
    "index names too much": (
        _index(lambda weight_map: weight_map.update(ghost=weight_map[Q_PROJ])),
        rf"ghost is missing; {INDEX} puts it there",
    ),
    "index leaves the folder": (
        _index(lambda weight_map: weight_map.update({Q_PROJ: "../other.safetensors"})),
        "not a file of this folder",
    ),
    "broken index": (lambda f: (f / INDEX).write_text("{"), rf"{INDEX}: broken JSON"),
    "empty index": (lambda f: (f / INDEX).write_text("{}"), rf"{INDEX}: no weight_map"),
}


def _assert_refused(folder, message):
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ConversionError, match=message):
        hf_to_megatron(folder, folder.parent / "out")
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("case", SINGLE)
def test_a_broken_folder_is_refused(qwen3, case):
    breaks, message = SINGLE[case]
    breaks(qwen3)
    _assert_refused(qwen3, message)


@pytest.mark.parametrize("case", SHARDED)
def test_a_broken_folder_with_shards_is_refused(make_qwen3, case):
    folder = make_qwen3(shard_size="100KB")
    breaks, message = SHARDED[case]
    breaks(folder)
    _assert_refused(folder, message)


def test_mixed_dtypes_are_accepted_with_a_choice(qwen3, tmp_path):
    _tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ].bfloat16()}))(qwen3)
    hf_to_megatron(qwen3, tmp_path / "out", dtype="fp32")


def test_values_beyond_the_dtype_are_refused(qwen3):
    _tensors(lambda t: t[Q_PROJ][0].fill_(1e5))(qwen3)
    before = sorted(qwen3.parent.rglob("*"))
    with pytest.raises(
        ConversionError, match=rf"model.safetensors: {Q_PROJ} holds 100000, .*--dtype"
    ):
        hf_to_megatron(qwen3, qwen3.parent / "out", dtype="fp16")
    assert sorted(qwen3.parent.rglob("*")) == before


def test_an_unknown_dtype_is_refused(qwen3, tmp_path):
    with pytest.raises(ConversionError, match="'fp8' is not one of source, fp32, bf16, fp16"):
        hf_to_megatron(qwen3, tmp_path / "out", dtype="fp8")


def test_the_command_prints_the_error_and_exits_with_2(qwen3, tmp_path, run_command):
    (qwen3 / "config.json").unlink()
    result = run_command("hf_to_megatron", "--hf", qwen3, "--out", tmp_path / "out")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"error: {qwen3 / 'config.json'}: missing\n"


def test_an_output_that_is_a_file_is_refused(qwen3, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConversionError, match="out is a file"):
        hf_to_megatron(qwen3, tmp_path / "out", overwrite=True)


def _full_after(monkeypatch, calls):
    """The disk is full at that write."""
    write = os.pwrite

    def pwrite(*arguments):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_disk_that_fills_up_is_named_and_nothing_is_left(qwen3, tmp_path, monkeypatch, calls):
    hf_to_megatron(qwen3, tmp_path / "megatron")
    before = sorted(tmp_path.rglob("*"))
    full = "No space left on device while writing; make room"
    with monkeypatch.context() as patch:
        _full_after(patch, calls)
        with pytest.raises(ConversionError, match=rf"release/__0_\d\.distcp: {full}"):
            hf_to_megatron(qwen3, tmp_path / "out")
    with monkeypatch.context() as patch:
        _full_after(patch, calls)
        with pytest.raises(ConversionError, match=rf"model\.safetensors: {full}"):
            megatron_to_hf(tmp_path / "megatron", qwen3, tmp_path / "back")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_of_the_disk_in_the_flush_is_named(qwen3, tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ConversionError, match=r"distcp: Input/output error while writing"):
        hf_to_megatron(qwen3, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [qwen3]


def test_a_place_that_cannot_hold_the_output_is_named(qwen3, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="file is a file; choose another folder"):
        hf_to_megatron(qwen3, tmp_path / "file" / "deep" / "out")
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: path.name == "out")
        with pytest.raises(ConversionError, match=r"out is a mount point.*give a folder in it"):
            hf_to_megatron(qwen3, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(ConversionError, match="is not writable; choose another folder"):
            hf_to_megatron(qwen3, tmp_path / "out")


def test_a_file_that_cannot_be_read_is_named(qwen3, tmp_path, monkeypatch):
    def preadv(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(
        ConversionError, match=r"model\.safetensors: Input/output error while reading"
    ):
        hf_to_megatron(qwen3, tmp_path / "out")
