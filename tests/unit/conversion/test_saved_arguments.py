"""The arguments a checkpoint keeps: read without running code, compared with config.json."""

from __future__ import annotations

import argparse
import enum
import signal
import sys
import types
from contextlib import nullcontext

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conversion_helpers import LAYERS, VOCABULARY, expected_megatron, read_hf, write_config

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import family_for
from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.megatron_to_hf import megatron_to_hf, plan_export
from checkpoint_conversion.torch_dist.saved_arguments import (
    check_architecture,
    check_checkpoint_matches,
    read_saved_run,
)
from checkpoint_conversion.verify import verify

ENTRY = "common_state/shard_0_1"


class _Mode(enum.Enum):
    ON = "on"


def _expected(hf):
    config = read_hf_config(hf)
    return family_for(config).megatron_arguments(config)


def _state(**arguments):
    """What Megatron keeps of a run, with values that are not plain ones."""
    special = {
        "params_dtype": torch.bfloat16,
        "exit_signal": signal.SIGTERM,
        "function": torch.nn.functional.silu,
        "skipped": {1, 2},
        "window": (1, {2}),
    }
    return {
        "args": argparse.Namespace(**arguments, **special),
        "iteration": 7,
        "rerun_state_machine": {"losses": torch.ones(3), "function": torch.nn.functional.gelu},
    }


def _save_run(folder, hf, state=None, iteration=7):
    """A numbered checkpoint; the state is kept as Megatron keeps it, or not at all."""
    checkpoint = folder / f"iter_{iteration:07d}"
    entries = expected_megatron(read_hf(hf)) | ({} if state is None else {ENTRY: [state]})
    dcp.save(
        entries,
        storage_writer=dcp.FileSystemWriter(checkpoint),
        planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
        no_dist=True,
    )
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return checkpoint


def _check(folder, hf, iteration=None):
    check_checkpoint_matches(folder, read_hf_config(hf), hf, iteration)


def test_converted_checkpoint(qwen3, tmp_path):
    folder = tmp_path / "megatron"
    hf_to_megatron(qwen3, folder)
    for saved in (read_saved_run(folder).arguments, read_saved_run(folder / "release").arguments):
        assert saved.items() >= _expected(qwen3).items()
        assert saved["padded_vocab_size"] == VOCABULARY
    _check(folder, qwen3)
    _check(folder, qwen3, "release")


@pytest.mark.parametrize("legacy", [False, True], ids=["entry", "common.pt"])
def test_numbered_checkpoint(qwen3, tmp_path, legacy):
    state = _state(**_expected(qwen3), seed=5, load=None)
    checkpoint = _save_run(tmp_path, qwen3, None if legacy else state)
    if legacy:
        torch.save(state, checkpoint / "common.pt")
    for saved in (
        read_saved_run(tmp_path).arguments,
        read_saved_run(tmp_path, 7).arguments,
        read_saved_run(checkpoint).arguments,
    ):
        assert saved == {**_expected(qwen3), "seed": 5, "load": None}
    assert read_saved_run(tmp_path).iteration == read_saved_run(checkpoint).iteration == 7
    _check(tmp_path, qwen3, "7")
    with pytest.raises(ConversionError, match="iter_0000008: no such checkpoint"):
        read_saved_run(tmp_path, 8)


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"rope_theta": 5e6}, ["rotary_base is 500000 in the checkpoint and 5000000 by"]),
        ({"rms_norm_eps": 1e-5}, ["layernorm_epsilon is 1e-06 in the checkpoint and 1e-05 by"]),
        ({"num_hidden_layers": 2}, [f"num_layers is {LAYERS} in the checkpoint and 2 by"]),
        (
            {"rms_norm_eps": 1e-5, "num_hidden_layers": 2},
            ["layernorm_epsilon is 1e-06", f"num_layers is {LAYERS} "],
        ),
        ({"vocab_size": 500}, [f"vocab_size is {VOCABULARY} in the checkpoint and 500 by"]),
        ({"vocab_size": 600}, [f"padded_vocab_size is {VOCABULARY} ", "at least 600"]),
    ],
)
def test_another_architecture_is_refused(make_qwen3, tmp_path, changed, parts):
    hf = make_qwen3(old_style=True)
    hf_to_megatron(hf, tmp_path / "megatron")
    checkpoint = tmp_path / "megatron" / "release"
    write_config(hf, lambda config: config.update(changed))
    with pytest.raises(ConversionError) as error:
        _check(tmp_path / "megatron", hf)
    for part in (*parts, str(checkpoint), str(hf), "Give the HuggingFace folder"):
        assert part in str(error.value)
    with pytest.raises(ConversionError) as error:
        megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    assert parts[0] in str(error.value)
    assert not (tmp_path / "back").exists()


def test_verification_compares_the_arguments(make_qwen3, tmp_path):
    hf = make_qwen3(old_style=True)
    hf_to_megatron(hf, tmp_path / "megatron")
    write_config(hf, lambda config: config.update(rope_theta=10000))
    with pytest.raises(ConversionError, match=r"rotary_base is 500000 .* 10000 by"):
        verify(hf, megatron=tmp_path / "megatron")


@pytest.mark.parametrize(
    "changed",
    [
        {"rotary_base": 500000.0},
        {"max_position_embeddings": 4096},
        {"make_vocab_size_divisible_by": 128, "padded_vocab_size": 512},
        {"vocab_size": None, "padded_vocab_size": 512},
        {"vocab_size": 500, "padded_vocab_size": 512},
        {"attention_dropout": 0.1, "hidden_dropout": 0.1},
        {"kv_channels": None},
        {"layernorm_epsilon": torch.float32},
    ],
)
def test_what_may_differ(qwen3, tmp_path, changed):
    _save_run(tmp_path, qwen3, _state(**{**_expected(qwen3), **changed}))
    _check(tmp_path, qwen3)
    plan_export(tmp_path, qwen3)


@pytest.mark.parametrize("heads", [2, 4])
def test_without_grouped_queries_each_head_is_a_group(qwen3, tmp_path, heads):
    write_config(qwen3, lambda config: config.update(num_key_value_heads=heads))
    ungrouped = {"group_query_attention": False, "num_query_groups": 1}
    _save_run(tmp_path, qwen3, _state(**{**_expected(qwen3), **ungrouped}))
    if heads == 4:
        _check(tmp_path, qwen3)
        return
    with pytest.raises(ConversionError, match=r"num_query_groups is 4 .* 2 by"):
        _check(tmp_path, qwen3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm_epsilon": 1e-5}, "layernorm_epsilon is 1e-05 .* 1e-06 by"),
        ({"apply_layernorm_1p": True}, "layernorm_zero_centered_gamma is True .* not set by"),
        ({"rotary_interleaved": True}, "rotary_interleaved is True"),
        ({"window_size": (4096, 0)}, r"window_size is \(4096, 0\)"),
        ({"softmax_type": "off-by-one"}, "softmax_type is off-by-one"),
        ({"moe_layer_freq": 0}, r"moe_layer_freq is 0 .* \[1, 1, 1\] by"),
        ({"moe_layer_freq": 2}, r"moe_layer_freq is \[1, 0, 1\] .* \[1, 1, 1\] by"),
        ({"norm_epsilon": 1e-6, "apply_layernorm_1p": False, "softmax_type": "vanilla"}, None),
        ({"rotary_interleaved": False, "window_size": None, "glu_linear_offset": 0.0}, None),
        ({"moe_layer_freq": [1, 1, 1]}, None),
        ({"moe_router_topk_scaling_factor": 1.0, "rotary_seq_len_interpolation_factor": 1}, None),
        ({"moe_router_topk_scaling_factor": 2.5}, "moe_router_topk_scaling_factor is 2.5"),
        ({"window_size": (-1, -1), "no_rope_freq": [0, 0, 0]}, None),
        ({"no_rope_freq": [0, 0, 1]}, "no_rope_freq is"),
    ],
)
def test_arguments_of_other_models_versions_and_spellings(tmp_path, changed, message):
    """They change what the layers compute, and no tensor's name or shape."""
    expected = {"num_layers": 3, "layernorm_epsilon": 1e-6, "moe_layer_freq": 1}
    saved = {k: v for k, v in expected.items() if k != "layernorm_epsilon"} | changed
    if message is None:
        check_architecture(saved, expected, tmp_path, tmp_path)
        return
    with pytest.raises(ConversionError, match=message):
        check_architecture(saved, expected, tmp_path, tmp_path)


@pytest.mark.parametrize(("every", "is_refused"), [(1, False), ([1, 1, 1], False), (2, True)])
def test_the_size_of_dense_layers_counts_where_there_are_some(tmp_path, every, is_refused):
    """Trainers give it as they like for a model whose layers all have experts."""
    expected = {"num_layers": 3, "num_experts": 4, "moe_layer_freq": every, "ffn_hidden_size": 96}
    check_architecture(expected, expected, tmp_path, tmp_path)
    context = (
        pytest.raises(ConversionError, match="ffn_hidden_size is 256")
        if is_refused
        else nullcontext()
    )
    with context:
        check_architecture({**expected, "ffn_hidden_size": 256}, expected, tmp_path, tmp_path)


def test_a_zero_centred_norm_that_the_family_has_is_no_difference(tmp_path):
    expected = {"num_layers": 3, "layernorm_zero_centered_gamma": True}
    check_architecture({**expected, "apply_layernorm_1p": False}, expected, tmp_path, tmp_path)


@pytest.mark.parametrize(
    "state", [None, {}, {"iteration": 7}, {"args": None}, ["args"], {"args": torch.float32}]
)
def test_absent_arguments_are_accepted(qwen3, tmp_path, state):
    _save_run(tmp_path, qwen3, state)
    assert read_saved_run(tmp_path).arguments == {}
    assert read_saved_run(tmp_path).iteration == (7 if state == {"iteration": 7} else None)
    _check(tmp_path, qwen3)


class _Evil:
    def __init__(self, file):
        self._file = file

    def __reduce__(self):
        return open, (str(self._file), "w")


@pytest.mark.parametrize("legacy", [False, True], ids=["entry", "common.pt"])
def test_no_code_of_the_pickle_is_run(qwen3, tmp_path, legacy):
    trap = tmp_path / "trap"
    state = _state(**_expected(qwen3), evil=_Evil(trap)) | {"evil": _Evil(trap)}
    checkpoint = _save_run(tmp_path, qwen3, None if legacy else state)
    if legacy:
        torch.save(state, checkpoint / "common.pt")
    trap.unlink(missing_ok=True)
    named = r"common\.pt" if legacy else r"__0_0\.distcp: cannot read common_state"
    message = rf"{named}.*: it refers to _?io\.open, which has no place in it.* --ignore-arguments"
    for read in (
        lambda: read_saved_run(tmp_path).arguments,
        lambda: plan_export(tmp_path, qwen3),
        lambda: verify(qwen3, megatron=tmp_path),
    ):
        with pytest.raises(ConversionError, match=message):
            read()
    plan_export(tmp_path, qwen3, ignore_arguments=True)
    assert verify(qwen3, megatron=tmp_path, ignore_arguments=True).differences == []
    assert not trap.exists()
    if legacy:  # the trap works
        torch.load(checkpoint / "common.pt", weights_only=False)["evil"].close()
        assert trap.exists()


def test_classes_of_other_versions_of_megatron_are_passed_over(qwen3, tmp_path, monkeypatch):
    module = types.ModuleType("megatron.of.the.future")
    module.Mode = enum.Enum("Mode", ["FAST"], module=module.__name__)
    for name in ("megatron.of", "megatron.of.the", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    _save_run(tmp_path, qwen3, _state(**_expected(qwen3), mode=module.Mode.FAST, kind=module.Mode))
    assert read_saved_run(tmp_path).arguments == _expected(qwen3)


def test_a_class_of_another_package_is_named(qwen3, tmp_path):
    _save_run(tmp_path, qwen3, _state(**_expected(qwen3), mode=_Mode.ON))
    with pytest.raises(ConversionError, match=r"refers to \w+\._Mode.* --ignore-arguments"):
        plan_export(tmp_path, qwen3)
    plan_export(tmp_path, qwen3, ignore_arguments=True)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04"])
def test_unreadable_arguments_are_an_error(qwen3, tmp_path, content):
    checkpoint = _save_run(tmp_path, qwen3)
    (checkpoint / "common.pt").write_bytes(content)
    with pytest.raises(ConversionError, match=r"common\.pt: cannot be read: it is no archive"):
        _check(tmp_path, qwen3)
