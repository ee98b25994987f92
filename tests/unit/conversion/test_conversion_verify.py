"""Bit comparison of folders and checkpoints."""

from __future__ import annotations

import pytest
import torch
from conversion_helpers import write_config
from safetensors.torch import load_file, save_file

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.in_transformers import load_language_model
from checkpoint_conversion.logits import compare_logits
from checkpoint_conversion.megatron_to_hf import megatron_to_hf
from checkpoint_conversion.verify import verify

K_PROJ = "model.layers.2.self_attn.k_proj.weight"
NORM = "model.norm.weight"


def _change(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _found(report):
    return [(d.name, d.what, d.detail) for d in report.differences]


def test_equal(make_qwen3, tmp_path, run_command):
    hf = make_qwen3(tied=True, dtype=torch.bfloat16)
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back", max_shard_size="50KB")
    for other in (("--megatron", tmp_path / "megatron"), (tmp_path / "back",)):
        result = run_command("verify", "--hf", hf, *other)
        assert (result.code, result.out) == (0, "equal: 35 tensors, 324224 bytes\n")
    assert run_command("verify", "--hf", hf, "--hf", tmp_path / "back").code == 0


def test_one_different_element_is_found_and_named(qwen3, tmp_path, run_command):
    hf_to_megatron(qwen3, tmp_path / "megatron")
    _change(qwen3, lambda t: t[K_PROJ][63, 5].add_(0.5))
    result = run_command("verify", "--hf", qwen3, "--megatron", tmp_path / "megatron")
    assert result.code == 1
    assert result.out.splitlines()[1].split() == [
        K_PROJ, "values", "1", "of", "4096,", "by", "up", "to", "0.5"
    ]  # fmt: skip
    assert result.out.endswith("different: 1 of 36 tensors\n")


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [(0.0, -0.0, False), (float("nan"), float("nan"), True), (1.0, 1.0 + 2**-23, False)],
)
def test_bits_are_compared_not_values(make_qwen3, one, other, equal):
    folders = make_qwen3("a"), make_qwen3("b")
    for folder, value in zip(folders, (one, other), strict=True):
        _change(folder, lambda t, value=value: t["model.norm.weight"][7].fill_(value))
    assert (_found(verify(*folders)) == []) is equal


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ([float("nan"), 0.5], "2 of 64, by up to 0.5, NaN in 1"),
        ([0.5, float("nan"), float("nan")], "3 of 64, by up to 0.5, NaN in 2"),
        ([float("nan")], "1 of 64, NaN in 1"),
        ([float("inf"), 0.5], "2 of 64, by up to inf"),
    ],
)
def test_the_largest_difference_is_of_numbers_and_nan_is_counted(make_qwen3, changes, detail):
    folders = make_qwen3("a"), make_qwen3("b")
    for folder, values in zip(folders, ([0.0] * len(changes), changes), strict=True):
        _change(folder, lambda t, new=values: t[NORM][: len(new)].copy_(torch.tensor(new)))
    assert _found(verify(*folders)) == [(NORM, "values", detail)]


def test_another_dtype_is_a_difference(qwen3, tmp_path):
    hf_to_megatron(qwen3, tmp_path / "megatron", dtype="bf16")
    report = verify(qwen3, megatron=tmp_path / "megatron")
    assert ("model.norm.weight", "dtype", "float32 / bfloat16") in _found(report)
    assert {d.what for d in report.differences} == {"dtype", "values"}


def test_folders_of_other_shape(make_qwen3):
    one, other = make_qwen3("a"), make_qwen3("b", layers=2)
    found = _found(verify(one, other))
    assert ("num_layers", "config", "3 / 2") in found
    assert (K_PROJ, "missing", f"in {other}") in found
    assert [what for _, what, _ in found].count("missing") == 11
    assert {what for _, what, _ in _found(verify(other, one))} == {"config", "missing", "values"}


def test_a_changed_rope_base_is_a_difference(make_qwen3):
    one, other = make_qwen3("a"), make_qwen3("b", old_style=True)
    assert _found(verify(one, other)) == []
    write_config(other, lambda config: config.update(rope_theta=10000))
    assert _found(verify(one, other)) == [("rotary_base", "config", "500000 / 10000")]


def test_what_cannot_be_read_is_an_error(qwen3, tmp_path, run_command):
    result = run_command("verify", "--hf", qwen3, "--megatron", tmp_path / "none")
    assert result.code == 2
    assert "none: no such folder" in result.err
    result = run_command("verify", "--hf", qwen3)
    assert result.code == 2
    assert "one of them" in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompts", "none.txt"), "--prompts is for logits; give --logits"),
        (("--tolerance", "0.1"), "--tolerance is for logits; give --logits"),
        (("--logits", "--tolerance", "-1"), "--tolerance -1 must be a finite number"),
        (("--logits", "--tolerance", "nan"), "--tolerance nan must be a finite number"),
        (("--iteration", "3"), "--iteration is a checkpoint's; give --megatron"),
        (("--ignore-arguments",), "--ignore-arguments is a checkpoint's; give --megatron"),
        (
            ("--megatron", "m", "--logits", "--ignore-arguments"),
            "--ignore-arguments is about comparing tensors; drop it, or --logits",
        ),
    ],
)
def test_options_without_effect_are_refused(qwen3, run_command, options, message):
    result = run_command("verify", "--hf", qwen3, qwen3, *options)
    assert result.code == 2
    assert message in result.err


def test_logits_need_a_tokenizer_of_the_model(qwen3):
    """The folder of a partial download, and one with the tokenizer of a larger vocabulary."""
    write_config(qwen3, lambda config: config.update(vocab_size=3))
    with pytest.raises(ConversionError, match="makes token 4 of 'one three', and the model has 3"):
        compare_logits(qwen3, qwen3, prompts=["one three"])
    (qwen3 / "tokenizer.json").unlink()
    (qwen3 / "tokenizer_config.json").unlink()
    with pytest.raises(
        ConversionError, match=r"no token of 'one three'; tokenizer\.json is missing"
    ):
        compare_logits(qwen3, qwen3, prompts=["one three"])


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_lacks_a_tensor_is_not_filled_with_random_values(make_qwen3, tied):
    hf = make_qwen3(tied=tied)
    assert load_language_model(hf, torch.float32).config.tie_word_embeddings is tied
    _change(hf, lambda tensors: tensors.pop(NORM if tied else "lm_head.weight"))
    with pytest.raises(ConversionError, match=r"no tensor .*\(1 are missing\).* random values"):
        load_language_model(hf, torch.float32)


def test_a_missing_checkpoint_is_found_before_logits_are_computed(qwen3, tmp_path, run_command):
    hf_to_megatron(qwen3, tmp_path / "megatron")
    for place, missing in (
        (("--megatron", tmp_path / "megatron", "--iteration", "7"), "iter_0000007"),
        (("--megatron", tmp_path / "megatron" / "none"), "none"),
    ):
        result = run_command("verify", "--hf", qwen3, *place, "--logits")
        assert result.code == 2
        assert f"{missing}: no such" in result.err
