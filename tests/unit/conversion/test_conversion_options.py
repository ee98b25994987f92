"""Options of the commands, and what the engine promises: no torch, any number of workers, fixed memory."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import pickle
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conversion_helpers import assert_equal, expected_megatron, read_hf, read_megatron
from safetensors.torch import load_file, save_file
from test_megatron_to_hf import assert_same_tensors, save_run, trained
from tiny_families import make_family

from checkpoint_conversion.cli import FlagHelp
from checkpoint_conversion.engine import dtypes, raw_files
from checkpoint_conversion.engine.values import converted
from checkpoint_conversion.engine.workers import run_all
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import family_for
from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.megatron_to_hf import megatron_to_hf
from checkpoint_conversion.pickles import torch_pickle
from checkpoint_conversion.torch_dist.saved_arguments import stock_flags

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
NO_TORCH = """
import sys
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.megatron_to_hf import megatron_to_hf
hf, plain, megatron, back = sys.argv[1:]
hf_to_megatron(hf, plain)
megatron_to_hf(plain, hf, back)
print(sorted({"torch", "megatron", "transformers", "numpy"} & sys.modules.keys()))
hf_to_megatron(hf, megatron, dtype="fp32", check_finite=True)
megatron_to_hf(megatron, hf, back, dtype="bf16", overwrite=True)
print(sorted({"torch", "megatron", "transformers"} & sys.modules.keys()))
"""


def test_neither_direction_imports_torch(make_qwen3, tmp_path):
    hf = make_qwen3(dtype=torch.bfloat16)
    """Nor numpy, unless values are looked at: it takes longer to start than all the rest."""
    folders = (tmp_path / name for name in ("plain", "megatron", "back"))
    command = [sys.executable, "-c", NO_TORCH, hf, *folders]
    result = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    assert result.stdout == "[]\n[]\n"
    assert_same_tensors(hf, tmp_path / "back")


@pytest.mark.parametrize(
    ("default", "mark"),
    [
        *((0, "(default 0)"), (0.0, "(default 0.0)"), (True, "(default on)"), ("a", "(default a)")),
        *((None, ""), (False, ""), ("", ""), ([], "")),
    ],
)
def test_help_names_a_default_also_if_it_is_0(default, mark):
    parser = argparse.ArgumentParser(formatter_class=FlagHelp)
    parser.add_argument("--flag", default=default, help="words")
    (line,) = (line for line in parser.format_help().splitlines() if "words" in line)
    assert line.partition("words")[2].strip() == mark


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_check_finite(make_qwen3, tmp_path, run_command, value, dtype):
    hf, out = make_qwen3(dtype=dtype), tmp_path / "out"
    tensors = load_file(hf / "model.safetensors")
    tensors[Q_PROJ][5, 7] = value
    save_file(tensors, hf / "model.safetensors")
    refused = run_command("hf_to_megatron", "--hf", hf, "--out", out, "--check-finite")
    assert refused.code == 2
    assert f"{hf / 'model.safetensors'}: {Q_PROJ} holds NaN or infinity" in refused.err
    assert not out.exists()
    hf_to_megatron(hf, out)
    arguments = ("--megatron", out, "--hf-template", hf, "--out", tmp_path / "back")
    refused = run_command("megatron_to_hf", *arguments, "--check-finite")
    assert refused.code == 2
    assert "self_attention.linear_qkv.weight holds NaN or infinity" in refused.err
    assert not (tmp_path / "back").exists()
    assert run_command("megatron_to_hf", *arguments).code == 0
    copy = read_hf(tmp_path / "back")[Q_PROJ]
    assert torch.equal(copy.view(torch.uint8), tensors[Q_PROJ].view(torch.uint8))


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_files_do_not_depend_on_the_workers(make_qwen3, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("checkpoint_conversion.torch_dist.writer._LEAST_FILE_BYTES", 50_000)
    hf = make_qwen3(shard_size="100KB")
    hf_to_megatron(hf, tmp_path / "one", workers=1)
    hf_to_megatron(hf, tmp_path / "many", workers=workers)
    files = sorted(file.name for file in (tmp_path / "one" / "release").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "many" / "release").iterdir())
    for name in files:
        one, many = (tmp_path / out / "release" / name for out in ("one", "many"))
        assert one.read_bytes() == many.read_bytes(), name
    megatron_to_hf(tmp_path / "many", hf, tmp_path / "back", workers=workers)
    assert_same_tensors(hf, tmp_path / "back")
    with pytest.raises(ConversionError, match="--workers is 0"):
        hf_to_megatron(hf, tmp_path / "none", workers=0)


def test_the_disk_gets_a_file_while_it_grows(qwen3, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(raw_files, "_WRITEBACK_BYTES", 10_000)
    monkeypatch.setattr(raw_files, "_sync_file_range", lambda *arguments: started.append(arguments))
    hf_to_megatron(qwen3, tmp_path / "out")
    imports = len(started)
    assert imports > 10
    megatron_to_hf(tmp_path / "out", qwen3, tmp_path / "back")
    assert len(started) > imports + 10
    monkeypatch.setattr(raw_files, "_sync_file_range", None)  # a system that cannot
    hf_to_megatron(qwen3, tmp_path / "out", overwrite=True)
    assert_equal(read_megatron(tmp_path / "out" / "release")[0], expected_megatron(read_hf(qwen3)))


def test_the_first_error_ends_the_work():
    """The items do not end by themselves."""

    def work(number):
        if number == 3:
            raise ConversionError("three")

    with pytest.raises(ConversionError, match="three"):
        run_all(work, itertools.count(), 2)


def test_every_entry_is_a_sound_archive(qwen3, tmp_path):
    """Checksums too, which torch does not compare."""
    hf_to_megatron(qwen3, tmp_path / "out")
    release = tmp_path / "out" / "release"
    metadata = dcp.FileSystemReader(release).read_metadata()
    for index, place in metadata.storage_data.items():
        with (release / place.relative_path).open("rb") as stream:
            stream.seek(place.offset)
            entry = io.BytesIO(stream.read(place.length))
        with zipfile.ZipFile(entry) as archive:
            assert archive.testzip() is None, index
            assert {"archive/data.pkl", "archive/version"} <= set(archive.namelist())
        entry.seek(0)
        assert torch.load(entry, weights_only=not index.fqn.startswith("common_state")) is not None


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
def test_conversions_of_dtypes_are_those_of_torch(source, target):
    kind = getattr(torch, source)
    if kind == torch.float32:
        bits = torch.randint(-(2**31), 2**31, (1 << 20,), dtype=torch.int64).to(torch.int32)
        ties = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16 + 2**15
        values = torch.cat([bits, ties, torch.tensor([0, 1, -1])]).to(torch.int32).view(kind)
    else:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(kind)
    expected = values.to(getattr(torch, target))
    fits = expected.isfinite() | ~values.isfinite()
    values, expected = values[fits].contiguous(), expected[fits]
    data = memoryview(values.view(torch.uint8).numpy())
    names = dtypes.TORCH_DTYPES
    result = converted(data, names[source], names[target], "x")
    found = torch.frombuffer(bytearray(result), dtype=expected.dtype)
    number = ~expected.isnan()
    assert torch.equal(found.isnan(), expected.isnan())
    signed = torch.int32 if target == "float32" else torch.int16
    assert torch.equal(found.view(signed)[number], expected.view(signed)[number])


def test_a_value_beyond_the_dtype_is_named(qwen3, tmp_path):
    tensors = load_file(qwen3 / "model.safetensors")
    tensors[Q_PROJ][0, 0] = -7e4
    save_file(tensors, qwen3 / "model.safetensors")
    with pytest.raises(ConversionError, match=rf"{Q_PROJ} holds 70000, more than float16"):
        hf_to_megatron(qwen3, tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


class _Evil:
    def __reduce__(self):
        return print, ("code of the weights ran",)


def _pickled(hf, shards=1, extra=None):
    """The same folder with pytorch_model.bin in place of safetensors."""
    tensors = list(read_hf(hf).items())
    for file in hf.glob("model*.safetensors*"):
        file.unlink()
    names = ["pytorch_model.bin"]
    if shards > 1:
        names = [f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin" for n in range(shards)]
        weight_map = {name: names[i % shards] for i, (name, _) in enumerate(tensors)}
        index = {"metadata": {}, "weight_map": weight_map}
        (hf / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for number, name in enumerate(names):
        content = dict(tensors[number::shards])
        torch.save(content | ({} if extra is None else {"extra": extra}), hf / name)


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_on_request(qwen3, tmp_path, run_command, shards):
    expected = expected_megatron(read_hf(qwen3))
    _pickled(qwen3, shards)
    arguments = ("--hf", qwen3, "--out", tmp_path / "out")
    refused = run_command("hf_to_megatron", *arguments)
    assert refused.code == 2
    assert "--allow-pickle" in refused.err
    assert run_command("hf_to_megatron", *arguments, "--allow-pickle").code == 0
    assert_equal(read_megatron(tmp_path / "out" / "release")[0], expected)


def test_no_code_of_pickled_weights_is_run(qwen3, tmp_path, capsys):
    _pickled(qwen3, extra=_Evil())
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin: no state dict"):
        hf_to_megatron(qwen3, tmp_path / "out", allow_pickle=True)
    assert "code of the weights ran" not in capsys.readouterr().out
    torch.load(qwen3 / "pytorch_model.bin", weights_only=False)  # the trap works
    assert "code of the weights ran" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(3, 2).T}, "not stored row by row"),
        ({"a": torch.ones(3, dtype=torch.int8)}, "CharStorage"),
        ([torch.ones(3)], "it holds a list"),
        (None, "no state dict"),
    ],
)
def test_other_pickles_are_refused(qwen3, tmp_path, content, message):
    _pickled(qwen3)
    torch.save(
        content, qwen3 / "pytorch_model.bin", _use_new_zipfile_serialization=content is not None
    )
    with pytest.raises(ConversionError, match=message):
        hf_to_megatron(qwen3, tmp_path / "out", allow_pickle=True)


def test_a_transposed_tensor_in_a_checkpoint(qwen3, tmp_path):
    tensors = trained(qwen3)
    key = "embedding.word_embeddings.weight"
    tensors[key] = tensors[key].T.contiguous().T
    checkpoint = save_run(tmp_path / "run", tensors)
    shutil.rmtree(checkpoint)
    dcp.save(tensors, checkpoint_id=checkpoint, no_dist=True)
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    megatron_to_hf(tmp_path / "run", qwen3, tmp_path / "back")
    assert_same_tensors(qwen3, tmp_path / "back")


def test_dry_run_of_an_export(qwen3, tmp_path, run_command):
    save_run(tmp_path / "run", trained(qwen3))
    before = sorted(tmp_path.rglob("*"))
    arguments = ("--megatron", tmp_path / "run", "--hf-template", qwen3, "--out", tmp_path / "back")
    result = run_command("megatron_to_hf", *arguments, "--dry-run", "--dtype", "bf16")
    assert result.code == 0
    assert sorted(tmp_path.rglob("*")) == before
    for name, tensor in read_hf(qwen3).items():
        line = next(line for line in result.out.splitlines() if f" {name} " in line)
        assert str(list(tensor.shape)) in line
        assert "F32 -> BF16" in line
        assert line.endswith(str(tensor.nbytes // 2))
    assert "11 tensors -> 36 tensors, 389120 bytes (389 kB); about" in result.out


@pytest.mark.parametrize(
    "value",
    [
        None,
        [True, False, 0, -1, 2**31 - 1, -(2**31), 2**31, -(2**40), 2**63, 255, 65536],
        {"a": ("x", "x", ""), "ü": [], 3: ((), (1,), (1, 2, 3, 4))},
    ],
)
def test_pickles_are_those_of_the_standard_library(value):
    assert pickle.loads(torch_pickle.dumps(value)) == value


def test_flags_for_a_stock_script(tmp_path, run_command):
    flags = {
        name: stock_flags(family_for(config).megatron_arguments(config))
        for name in ("qwen3", "qwen3-moe", "qwen2", "llama")
        for config in [read_hf_config(make_family(tmp_path / name, name))]
    }
    assert flags == {
        "qwen3": "--norm-epsilon 1e-06 --qk-layernorm",
        "qwen3-moe": "--norm-epsilon 1e-06 --qk-layernorm --moe-router-dtype fp32 "
        "--moe-aux-loss-coeff 0.001",
        "qwen2": "--norm-epsilon 1e-06",
        "llama": "--norm-epsilon 1e-06 --use-rope-scaling --rope-scaling-factor 8.0",
    }
    result = run_command("hf_to_megatron", "--hf", tmp_path / "llama", "--out", tmp_path / "out")
    assert f"--use-checkpoint-args {flags['llama']}" in result.out
