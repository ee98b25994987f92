"""Checkpoints that are whole, damaged, or would run something."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile_files import PAYLOADS, Creates, archive, build, byte_tensor, saved

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.pickles.uses import check_old_storage
from checkpoint_conversion.pickles.values import PickleError
from checkpoint_conversion.torch_dist import integrity
from checkpoint_conversion.torch_dist.checksum_list import CHECKSUMS, write_checksums
from checkpoint_conversion.torch_dist.integrity import check_content, check_present, check_whole
from checkpoint_conversion.torch_dist.metadata import read_metadata
from megatron_profit.megatron_patches import checkpoint_loading

EXTRA = "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_2"
RNG = "rng_state/shard_0.0_1.1"
COMMON = "common_state/shard_0_1"


def common_state() -> dict:
    args = argparse.Namespace(
        lr=1e-3, params_dtype=torch.bfloat16, save=None, betas=[0.9, 0.95], load=Path("a").name
    )
    return {
        "args": args,
        "iteration": 2,
        "checkpoint_version": 3.0,
        "optimizer": {"step": torch.ones(1)},
    }


def objects() -> dict[str, bytes]:
    rng = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }
    return {
        COMMON: saved([common_state()]),
        RNG: saved([[rng]]),
        EXTRA: saved([None]),
        EXTRA.replace("_0_2", "_1_2"): saved([torch.empty(0, dtype=torch.uint8)]),
    }


TENSORS = {
    "embedding.weight": torch.arange(12.0).view(3, 4),
    "norm.weight": torch.ones(4).bfloat16(),
}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = build(tmp_path / "iter_0000002", TENSORS, objects())
    write_checksums(folder)
    return folder


def check(folder: Path) -> None:
    check_whole(folder)
    check_content(folder, threads=2)


@pytest.fixture
def patched(monkeypatch) -> None:
    """torch's loaders as a training has them."""
    pytest.importorskip("megatron.core")  # registers its classes with torch
    monkeypatch.setattr(dcp.FileSystemReader, "read_metadata", dcp.FileSystemReader.read_metadata)
    monkeypatch.setattr(dcp.FileSystemReader, "read_data", dcp.FileSystemReader.read_data)
    monkeypatch.setattr(dcp.DefaultLoadPlanner, "load_bytes", dcp.DefaultLoadPlanner.load_bytes)
    checkpoint_loading._make_metadata_of_plain_values()
    checkpoint_loading._vet_entries_before_they_are_read()
    checkpoint_loading._load_objects_without_running_them()


def load(folder: Path) -> dict:
    """All of a checkpoint, through torch."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    content = {
        key: torch.zeros(entry.size, dtype=entry.properties.dtype)
        if hasattr(entry, "size")
        else io.BytesIO()
        for key, entry in entries.items()
    }
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(content, storage_reader=dcp.FileSystemReader(folder), planner=planner, no_dist=True)
    return content


def test_a_checkpoint_is_whole_and_torch_loads_it_unchanged(checkpoint, patched):
    check(checkpoint)
    content = load(checkpoint)
    for key, tensor in TENSORS.items():
        assert torch.equal(content[key], tensor)
    assert content[COMMON][0]["args"].betas == [0.9, 0.95]
    assert content[COMMON][0]["args"].params_dtype is torch.bfloat16
    ((rng,),) = content[RNG]
    assert rng["random_rng_state"] == random.getstate()
    assert np.array_equal(rng["np_rng_state"][1], np.random.get_state()[1])
    assert content[EXTRA] == [None]


def test_values_of_every_kind_on_the_list_are_loaded_unchanged(checkpoint, patched):
    from megatron.core import rerun_state_machine as rerun
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.enums import AttnBackend

    value = {
        "rerun": rerun.Call(rerun.Caller("NaN", 3), 7),
        "modes": [rerun.RerunMode.DISABLED, rerun.RerunState.NOT_RUNNING_YET, AttnBackend.flash],
        "config": OptimizerConfig(lr=0.5),
        "numbers": [np.float64(0.5), np.int64(3), np.arange(4.0), np.array([True]), 2**70, 1j],
        "sets": [{1, 2}, frozenset(["a"]), b"", b"ab\xff", bytearray(b"c")],
        "torch": [
            torch.float16,
            torch.Size([2]),
            torch.device("cpu"),
            torch.nn.Parameter(torch.ones(2)),
        ],
        "others": [
            Path("a"),
            signal.SIGTERM,
            types.SimpleNamespace(a=1),
            collections.OrderedDict(a=1),
        ],
    }
    _rebuilt(rng=saved([value]))(checkpoint)
    write_checksums(checkpoint)
    check(checkpoint)
    (loaded,) = load(checkpoint)[RNG]
    assert repr(loaded) == repr(value)


def test_a_conversion_lists_its_checksums(qwen3, tmp_path):
    hf_to_megatron(qwen3, tmp_path / "megatron")
    release = tmp_path / "megatron" / "release"
    assert list(json.loads((release / CHECKSUMS).read_text())["crc32"]) == [".metadata"]
    check(release)


def _metadata_with(payload: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / ".metadata").write_bytes(payload)


def _rebuilt(tensors: dict | None = None, **changed: bytes) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        names = {"common": COMMON, "rng": RNG, "extra": EXTRA}
        found = objects() | {names[name]: content for name, content in changed.items()}
        build(folder, TENSORS | (tensors or {}), found)

    return change


def places(payload: bytes) -> dict[str, tuple[Callable[[Path], object], str]]:
    """Where a checkpoint can hold a pickle: how it gets there, and what a message names."""
    stream = io.BytesIO(archive(payload))
    return {
        ".metadata": (_metadata_with(payload), r"\.metadata: not readable: it "),
        "common state": (
            _rebuilt(common=archive(payload)),
            rf"__0_0\.distcp: {COMMON} cannot be loaded",
        ),
        "random numbers": (
            _rebuilt(rng=archive(payload)),
            rf"__0_0\.distcp: {RNG} cannot be loaded",
        ),
        "extra state": (_rebuilt(extra=archive(payload)), rf"{EXTRA} cannot be loaded"),
        "extra state of bytes": (
            _rebuilt(extra=saved([byte_tensor(payload)])),
            rf"{EXTRA} cannot be loaded",
        ),
        "extra state of a stream": (_rebuilt(extra=saved([stream])), rf"{EXTRA} cannot be loaded"),
        "tensor": (_rebuilt({"norm.weight": archive(payload)}), r"norm\.weight cannot be loaded"),
        "common.pt": (
            lambda folder: (folder / "common.pt").write_bytes(archive(payload)),
            r"common\.pt: it cannot be loaded",
        ),
    }


@pytest.mark.parametrize("place", places(b"."))
@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_would_run_is_refused_wherever_it_is(checkpoint, patched, tmp_path, place, payload):
    canary = tmp_path / "canary"
    put, message = places(PAYLOADS[payload](canary))[place]
    (checkpoint / CHECKSUMS).unlink()
    put(checkpoint)
    with pytest.raises(ConversionError, match=message) as refused:
        check(checkpoint)
    assert "\n" not in str(refused.value)
    if place == "common.pt":
        with pytest.raises(ConversionError, match=message):
            integrity.read_vetted_common_file(checkpoint)
    else:
        with pytest.raises(BaseException, match=message):  # torch's CheckpointException is one
            load(checkpoint)
    assert not canary.exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_what_would_run_deep_in_metadata_is_refused(checkpoint, patched, tmp_path, protocol):
    canary = tmp_path / "canary"
    (checkpoint / CHECKSUMS).unlink()
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = {"a": [Creates(canary)]}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    for read in (check, load):
        with pytest.raises(
            ConversionError, match=r"\.metadata: not readable: it refers to \w+\.open"
        ):
            read(checkpoint)
    assert not canary.exists()


def test_the_payloads_work_in_the_loaders_of_torch(checkpoint, tmp_path):
    canary = tmp_path / "canary"
    put, _ = places(PAYLOADS["protocol 2"](canary))["random numbers"]
    put(checkpoint)
    load(checkpoint)[RNG].close()
    assert canary.exists()


# A recipe as transformer_engine.common.recipe has it.


class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    HYBRID = _FormatHelper(448, 57344)


@dataclasses.dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_compute_algo: object = "max"


@pytest.fixture
def recipe(monkeypatch) -> types.ModuleType:
    module = types.ModuleType("transformer_engine.common.recipe")
    for cls in (_FormatHelper, Format, DelayedScaling):
        monkeypatch.setattr(cls, "__module__", module.__name__)
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.common", types.ModuleType("common"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def extra_state(recipe: object) -> bytes:
    state = {
        "recipe": recipe,
        "scale_fwd": torch.ones(3),
        "amax_history_fwd": torch.zeros(16, 3),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1},
    }
    return pickle.dumps(state)


def test_states_of_fp8_recipes_are_accepted(checkpoint, patched, recipe):
    for content in (extra_state(DelayedScaling()), pickle.dumps({}), pickle.dumps({"forward": {}})):
        _rebuilt(extra=saved([byte_tensor(content)]))(checkpoint)
        write_checksums(checkpoint)
        check(checkpoint)
        (tensor,) = load(checkpoint)[EXTRA]
        assert tensor.numpy().tobytes() == content
    stream = io.BytesIO()
    torch.save({"scale_fwd": torch.ones(3), "extra_fp8_variables": {}}, stream)
    _rebuilt(extra=saved([stream]))(checkpoint)
    write_checksums(checkpoint)
    check(checkpoint)


@pytest.mark.parametrize(
    "function", [os.system, torch._utils._rebuild_tensor_v2], ids=["os", "torch"]
)
def test_a_recipe_with_a_function_is_refused(checkpoint, recipe, function):
    """Transformer Engine calls it, so that it must not even be one that may be called while loading."""
    content = extra_state(DelayedScaling(amax_compute_algo=function))
    _rebuilt(extra=saved([byte_tensor(content)]))(checkpoint)
    (checkpoint / CHECKSUMS).unlink()
    with pytest.raises(ConversionError, match=r"_extra_state/shard_0_2 cannot be loaded"):
        check_whole(checkpoint)


@pytest.mark.parametrize("place", range(5))
def test_every_pickle_of_a_storage_in_the_old_format_is_vetted(tmp_path, place):
    canary = tmp_path / "canary"
    stream = io.BytesIO()
    torch.save(torch.ones(3).untyped_storage(), stream, _use_new_zipfile_serialization=False)
    content = stream.getvalue()
    check_old_storage(content)
    starts = [0]
    for _ in range(5):
        stream.seek(starts[-1])
        unpickler = pickle.Unpickler(stream)
        unpickler.persistent_load = lambda identity: identity
        unpickler.load()
        starts.append(stream.tell())
    evil = pickle.dumps(Creates(canary))
    with pytest.raises(PickleError, match="open, which has no place in it"):
        check_old_storage(content[: starts[place]] + evil + content[starts[place + 1] :])
    with pytest.raises(PickleError, match="broken"):
        check_old_storage(content[: starts[place]])


def test_bytes_that_are_seen_in_another_order_are_refused(checkpoint, tmp_path):
    """Vetted as they lie in the file, unpickled as the tensor shows them."""
    canary = tmp_path / "canary"
    evil, harmless = pickle.dumps(Creates(canary)), pickle.dumps({})
    both = torch.zeros(2 * len(evil), dtype=torch.uint8)
    both[: len(harmless)] = byte_tensor(harmless)
    both[::2] = byte_tensor(evil)
    for tensor in (both[::2], byte_tensor(evil)[None], both.view(torch.int16)):
        _rebuilt(extra=saved([tensor]))(checkpoint)
        (checkpoint / CHECKSUMS).unlink(missing_ok=True)
        with pytest.raises(ConversionError, match="cannot be loaded"):
            check_whole(checkpoint)


def test_an_object_of_an_unknown_class_is_named(checkpoint):
    _rebuilt(rng=saved([Path("a"), collections.Counter("aab")]))(checkpoint)
    (checkpoint / CHECKSUMS).unlink()
    with pytest.raises(
        ConversionError, match=r"refers to collections\.Counter, which has no place in it"
    ):
        check_whole(checkpoint)


def test_every_flipped_bit_is_found_or_without_effect(checkpoint, patched):
    check(checkpoint)
    expected = load(checkpoint)
    generator = random.Random(5)
    for file in sorted(checkpoint.iterdir()):
        content = bytearray(file.read_bytes())
        for _ in range(120):
            index, bit = generator.randrange(len(content)), generator.randrange(8)
            content[index] ^= 1 << bit
            file.write_bytes(content)
            if _is_sound(checkpoint):
                assert file.name == "__0_0.distcp", f"bit {bit} of byte {index} of {file.name}"
                _assert_alike(load(checkpoint), expected)
            content[index] ^= 1 << bit
        file.write_bytes(content)
    check(checkpoint)


def _is_sound(folder: Path) -> bool:
    try:
        check(folder)
    except ConversionError:
        return False
    return True


def _assert_alike(one: dict, other: dict) -> None:
    for key, value in other.items():
        assert saved(one[key]) == saved(value), key


def _removed(folder: Path, name: str) -> None:
    (folder / name).unlink()


DAMAGE = {
    "a file of the list": lambda folder: _removed(folder, "old_policy.safetensors"),
    "a changed file of the list": lambda folder: (folder / "old_policy.safetensors").write_bytes(
        b"x"
    ),
    "half of a file": lambda folder: os.truncate(folder / "__0_0.distcp", 3000),
    "no metadata.json": lambda folder: _removed(folder, "metadata.json"),
    "another version": lambda folder: (folder / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 2}'
    ),
    "a broken list": lambda folder: (folder / CHECKSUMS).write_text("{}"),
    "a list that names another folder": lambda folder: (folder / CHECKSUMS).write_text(
        '{"format": 1, "crc32": {"../x": "00000000"}}'
    ),
    "a pipe": lambda folder: (_removed(folder, "__0_0.distcp"), os.mkfifo(folder / "__0_0.distcp")),
    "a pipe as a list": lambda folder: (_removed(folder, CHECKSUMS), os.mkfifo(folder / CHECKSUMS)),
    "a pipe as .metadata": lambda folder: (
        _removed(folder, CHECKSUMS),
        _removed(folder, ".metadata"),
        os.mkfifo(folder / ".metadata"),
    ),
    "a pipe as common.pt": lambda folder: os.mkfifo(folder / "common.pt"),
    "a link to nothing as common.pt": lambda folder: (folder / "common.pt").symlink_to("nothing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_missing_or_changed_is_named(tmp_path, damage):
    folder = build(tmp_path / "iter_0000002", TENSORS, objects())
    (folder / "old_policy.safetensors").write_bytes(b"numbers")
    write_checksums(folder)
    check(folder)
    DAMAGE[damage](folder)
    with pytest.raises(ConversionError, match="iter_0000002"):
        check(folder)


def test_an_evaluation_that_comes_later_is_no_damage(checkpoint):
    (checkpoint / "validation.json").write_text('{"lm loss": 1.0}')
    check(checkpoint)
    (checkpoint / "validation.json").write_text('{"lm loss": 2.0}')
    check(checkpoint)


def test_a_checkpoint_without_a_list_is_checked_by_its_archives(checkpoint):
    (checkpoint / CHECKSUMS).unlink()
    check(checkpoint)
    content = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    at = bytes(content).index(TENSORS["embedding.weight"].numpy().tobytes())
    content[at + 20] ^= 1
    (checkpoint / "__0_0.distcp").write_bytes(content)
    check_whole(checkpoint)
    with pytest.raises(
        ConversionError, match=r"embedding\.weight is damaged: the checksum of data/0"
    ):
        check_content(checkpoint)


def test_a_tensor_of_another_shape_or_dtype_than_metadata_says(checkpoint):
    for other in (torch.ones(5), torch.ones(4, dtype=torch.float64)):
        _rebuilt({"norm.weight": saved(other)})(checkpoint)
        (checkpoint / CHECKSUMS).unlink(missing_ok=True)
        check_whole(checkpoint)
        with pytest.raises(
            ConversionError, match=r"norm\.weight is a .*Storage .* but \.metadata says"
        ):
            check_content(checkpoint)


@pytest.mark.parametrize("shares", [1, 2, 3, 7, 100])
def test_shares_are_everything_and_each_entry_is_in_one(checkpoint, monkeypatch, shares):
    seen = []
    monkeypatch.setattr(integrity, "_check_entry", lambda _, entry: seen.append(entry.key))
    for number in range(shares):
        check_content(checkpoint, number, shares)
    metadata = read_metadata(checkpoint)
    assert sorted(seen) == sorted([*metadata.tensors, *metadata.objects])


def test_presence_alone_reads_no_entry(checkpoint):
    (checkpoint / "__0_0.distcp").write_bytes(bytes((checkpoint / "__0_0.distcp").stat().st_size))
    check_present(checkpoint)
    os.truncate(checkpoint / "__0_0.distcp", 100)
    with pytest.raises(ConversionError, match="truncated"):
        check_present(checkpoint)


def test_metadata_must_stay_in_its_folder(checkpoint, tmp_path):
    outside = tmp_path / "outside.distcp"
    shutil.copy(checkpoint / "__0_0.distcp", outside)
    for name in ("../outside.distcp", str(outside), "..", "a/b"):
        metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
        for info in metadata.storage_data.values():
            object.__setattr__(info, "relative_path", name)
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
        (checkpoint / CHECKSUMS).unlink(missing_ok=True)
        with pytest.raises(ConversionError, match="another folder"):
            check_whole(checkpoint)
