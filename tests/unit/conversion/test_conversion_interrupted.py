"""A conversion that is killed, one that runs at the same time, and the memory that one needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from subprocess import PIPE

import pytest
import torch
from conversion_helpers import assert_equal, expected_megatron, read_hf, read_megatron
from safetensors.torch import save_file

from checkpoint_conversion.engine import output
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.megatron_to_hf import megatron_to_hf

# Converts, and stops for good in the middle of the tensors.
STALLING = """
import sys, time
from checkpoint_conversion.hf.folder import HFTensor
from checkpoint_conversion import (hf_to_megatron, megatron_to_hf)
from checkpoint_conversion.hf import writer as hf_writer

def stalling(function):
    calls = 0
    def call(*arguments):
        nonlocal calls
        calls += 1
        if calls == 20:
            print("in the middle", flush=True)
            time.sleep(600)
        return function(*arguments)
    return call

HFTensor.read_rows_from = stalling(HFTensor.read_rows_from)
hf_writer.HFWriter.write_at = stalling(hf_writer.HFWriter.write_at)
getattr(sys.modules["checkpoint_conversion." + sys.argv[1]], sys.argv[1])(*sys.argv[2:], overwrite=True)
"""

# Runs a command with a twentieth of a second of rest before every read.
SLOW = """
import sys, time
from checkpoint_conversion import cli, hf_to_megatron
from checkpoint_conversion.hf.folder import HFTensor

def slow(self, *arguments):
    print("in the middle", flush=True)
    time.sleep(0.05)
    return read(self, *arguments)

read, HFTensor.read_rows_from = HFTensor.read_rows_from, slow
sys.argv = sys.argv[1:]
cli.run(hf_to_megatron.main)
"""


@pytest.fixture
def stalled():
    """Starts a conversion in a process of its own and waits until it is in the middle."""
    processes = []

    def start(*arguments):
        command = [sys.executable, "-c", STALLING, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "in the middle\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def _kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def _loadable(folder):
    """Files by which Megatron or transformers would find a model, anywhere below a folder."""
    names = ("latest_checkpointed_iteration.txt", "metadata.json", ".metadata", "config.json")
    return [file for file in folder.rglob("*") if file.name in names]


def test_killed_import(qwen3, tmp_path, stalled):
    work = tmp_path / "work"
    _kill(stalled("hf_to_megatron", qwen3, work / "out"))
    assert not (work / "out").exists()
    assert _loadable(work) == []
    hf_to_megatron(qwen3, work / "out")
    assert_equal(read_megatron(work / "out" / "release")[0], expected_megatron(read_hf(qwen3)))
    assert [entry.name for entry in work.iterdir()] == ["out"]


def test_killed_import_leaves_the_earlier_output(make_qwen3, tmp_path, stalled):
    first, second, out = make_qwen3("a"), make_qwen3("bb"), tmp_path / "out"
    hf_to_megatron(first, out)
    _kill(stalled("hf_to_megatron", second, out))
    assert_equal(read_megatron(out / "release")[0], expected_megatron(read_hf(first)))
    hf_to_megatron(second, out, overwrite=True)
    assert_equal(read_megatron(out / "release")[0], expected_megatron(read_hf(second)))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "bb", "out"]


def test_killed_export(qwen3, tmp_path, stalled):
    hf_to_megatron(qwen3, tmp_path / "megatron")
    work = tmp_path / "work"
    _kill(stalled("megatron_to_hf", tmp_path / "megatron", qwen3, work / "out"))
    assert not (work / "out").exists()
    assert _loadable(work) == []
    megatron_to_hf(tmp_path / "megatron", qwen3, work / "out")
    assert_equal(read_hf(work / "out"), read_hf(qwen3))
    assert [entry.name for entry in work.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_cleans_up(qwen3, tmp_path, number):
    arguments = ["hf_to_megatron", "--hf", str(qwen3), "--out", str(tmp_path / "work" / "out")]
    command = [sys.executable, "-c", SLOW, *arguments]
    # What a shell starts in the background ignores SIGINT, and so do its children.
    process = subprocess.Popen(
        command,
        stdout=PIPE,
        stderr=PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "in the middle\n"
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number
    assert (
        errors.splitlines()[-1] == f"stopped by {number.name}"
    )  # after the progress, if it took long
    assert list((tmp_path / "work").iterdir()) == []


def test_two_conversions_to_one_output_are_refused(qwen3, tmp_path, stalled):
    process = stalled("hf_to_megatron", qwen3, tmp_path / "work" / "out")
    with pytest.raises(ConversionError, match="another conversion"):
        hf_to_megatron(qwen3, tmp_path / "work" / "out")
    assert process.poll() is None
    _kill(process)
    hf_to_megatron(qwen3, tmp_path / "work" / "out")


def test_an_interrupted_replacement_is_undone(make_qwen3, tmp_path, monkeypatch):
    """Between the two renames of --overwrite the old output has no name of its own."""
    first, second, out = make_qwen3("a"), make_qwen3("bb"), tmp_path / "out"
    hf_to_megatron(first, out)

    def killed(partial, out):
        out.rename(output._back_up(out))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output, "_replace", killed)
        with pytest.raises(KeyboardInterrupt):
            hf_to_megatron(second, out, overwrite=True)
    with pytest.raises(ConversionError, match="--overwrite"):
        hf_to_megatron(second, out)
    assert_equal(read_megatron(out / "release")[0], expected_megatron(read_hf(first)))


MEMORY = """
import json, resource, sys
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.megatron_to_hf import megatron_to_hf
from checkpoint_conversion.verify import verify

peaks = []
for depth in ("shallow", "deep"):
    hf, megatron, back = (f"{sys.argv[1]}/{depth}-{kind}" for kind in ("hf", "megatron", "back"))
    hf_to_megatron(hf, megatron)
    megatron_to_hf(megatron, hf, back)
    assert not verify(hf, megatron=megatron).differences
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


def _make_wide(folder, layers):
    """A model of 8.4 MB per layer."""
    hidden, ffn, q, kv = 512, 2048, 1024, 512
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 1000,
        "max_position_embeddings": 128,
        "rope_theta": 10000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    shapes = {"model.embed_tokens.weight": (1000, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        for name, shape in {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "self_attn.q_norm": (128,),
            "self_attn.k_norm": (128,),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")


def test_memory_does_not_grow_with_depth(tmp_path):
    _make_wide(tmp_path / "shallow-hf", 2)
    _make_wide(tmp_path / "deep-hf", 20)
    size = (tmp_path / "deep-hf" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shallow, deep = json.loads(result.stdout)
    assert size > 170e6
    assert deep - shallow < 25e6
