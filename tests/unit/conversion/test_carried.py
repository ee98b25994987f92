"""Tensors that are carried along: the vision tower and the layers that predict further tokens."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conversion_helpers import read_hf
from safetensors.torch import load_file, save_file
from test_megatron_to_hf import assert_same_tensors
from tiny_gated_delta_net import make_model

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.carried import NOTES, notes_at_start, read_notes
from checkpoint_conversion.hf.model import open_hf_model
from checkpoint_conversion.hf.output import plan_output
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.megatron_to_hf import megatron_to_hf
from checkpoint_conversion.verify import verify

VISION = "model.visual.patch_embed.proj.weight"


@pytest.fixture
def hf(tmp_path):
    return make_model(tmp_path / "hf", "qwen3.5-vision", torch.bfloat16)


@pytest.fixture
def converted(tmp_path, hf):
    hf_to_megatron(hf, tmp_path / "megatron")
    return tmp_path / "megatron"


def _change(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_notes_list_each_carried_tensor_and_no_other(hf, converted):
    notes = json.loads((converted / "release" / NOTES).read_text())["tensors"]
    assert set(notes) == {n for n in read_hf(hf) if n.startswith(("model.visual.", "mtp."))}
    assert notes["mtp.layers.0.mlp.down_proj.weight"]["dtype"] == "F64"
    listed = json.loads((converted / "release" / "checksums.json").read_text())["crc32"]
    assert NOTES in listed


def test_a_model_without_carried_tensors_has_no_notes(tmp_path):
    hf_to_megatron(make_model(tmp_path / "hf", "qwen3.5"), tmp_path / "megatron")
    assert not (tmp_path / "megatron" / "release" / NOTES).exists()


def test_a_changed_tensor_is_an_error_and_nothing_is_written(tmp_path, hf, converted):
    def flip(tensors):
        tensors[VISION].view(torch.int16).view(-1)[3] ^= 1

    _change(hf, flip)
    with pytest.raises(ConversionError, match=f"{VISION} has changed since it was noted"):
        megatron_to_hf(converted, hf, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    found = verify(hf, megatron=converted).differences
    assert [(d.name, d.what) for d in found] == [(VISION, "values")]
    megatron_to_hf(converted, hf, tmp_path / "back", any_carried=True)
    assert_same_tensors(hf, tmp_path / "back")


def test_a_missing_tensor_is_an_error(tmp_path, hf, converted):
    _change(hf, lambda tensors: tensors.pop(VISION))
    with pytest.raises(ConversionError, match=f"no tensor {VISION}, which .*{NOTES} lists"):
        megatron_to_hf(converted, hf, tmp_path / "back")


def test_an_additional_tensor_and_another_shape_are_errors(tmp_path, hf, converted):
    other = shutil.copytree(hf, tmp_path / "other")
    _change(hf, lambda tensors: tensors.update({"mtp.new": torch.ones(2)}))
    with pytest.raises(ConversionError, match=r"mtp\.new is not among the tensors"):
        megatron_to_hf(converted, hf, tmp_path / "back")
    _change(other, lambda tensors: tensors.update({"mtp.norm.weight": torch.ones(3)}))
    with pytest.raises(
        ConversionError, match=r"mtp.norm.weight is F32 \[3\]; .* lists BF16 \[72\]"
    ):
        megatron_to_hf(converted, other, tmp_path / "back")


def test_a_checkpoint_without_notes_takes_the_tensors_of_the_template(tmp_path, hf, converted):
    (converted / "release" / NOTES).unlink()
    megatron_to_hf(converted, hf, tmp_path / "back")
    assert_same_tensors(hf, tmp_path / "back")


def test_damaged_notes_are_an_error(tmp_path, hf, converted):
    for text in ("{", '{"format": 1, "tensors": {"mtp.x": {"dtype": "F32"}}}', '{"format": 2}'):
        (converted / "release" / NOTES).write_text(text)
        with pytest.raises(ConversionError, match=NOTES):
            megatron_to_hf(converted, hf, tmp_path / "back")


def test_a_run_goes_on_with_the_notes_of_its_checkpoint(tmp_path, hf, converted):
    carried = open_hf_model(hf).carried
    fresh = notes_at_start(hf, carried, None)
    assert notes_at_start(hf, carried, converted / "release") == fresh
    _change(hf, lambda tensors: tensors[VISION].zero_())
    with pytest.raises(ConversionError, match="has changed"):
        notes_at_start(hf, open_hf_model(hf).carried, converted / "release")
    (hf / "model.safetensors").unlink()  # a folder for config and tokenizer alone
    assert notes_at_start(hf, {}, converted / "release") == fresh


def test_the_export_of_a_run_copies_what_was_noted_at_its_start(tmp_path, hf):
    output = plan_output(tmp_path / "out", hf, torch.bfloat16)
    noted = output.noting(notes_at_start(hf, output.carried, None))
    with noted.create() as partial:
        written = read_hf(partial)
    for name, tensor in read_hf(hf).items():
        if name in output.carried:
            assert torch.equal(written[name], tensor), name
    assert noted.elements == sum(t.nbytes // t.dtype.itemsize for t in noted.tensors.values())
    _change(hf, lambda tensors: tensors[VISION].zero_())
    again = plan_output(tmp_path / "again", hf, torch.bfloat16)
    assert noted.carried_notes is not None
    with (
        pytest.raises(ConversionError, match="has changed"),
        again.noting(noted.carried_notes).create(),
    ):
        pass
    assert not (tmp_path / "again").exists()


def test_an_export_that_lacks_noted_tensors_names_the_checkpoint(tmp_path, make_qwen3, converted):
    """Another model than the checkpoint's; the template has no notes that a message could name."""
    notes = read_notes(converted / "release")
    output = plan_output(tmp_path / "out", make_qwen3("other"), torch.bfloat16)
    with pytest.raises(
        ConversionError, match=rf"no tensor .* which {converted / 'release' / NOTES}"
    ):
        output.noting(notes, converted / "release")


def test_the_commands_tell_of_carried_tensors(tmp_path, hf, run_command):
    out = run_command("hf_to_megatron", "--hf", hf, "--out", tmp_path / "m").out
    line = "carried along unchanged, not trained: model.visual ("
    assert line in out
    assert "mtp (3 tensors" in out
    assert "Megatron-LM's own scripts cannot load it" in out
    back = ("--megatron", tmp_path / "m", "--hf-template", hf, "--out", tmp_path / "back")
    assert line in run_command("megatron_to_hf", *back, "--dry-run").out
    assert line in run_command("megatron_to_hf", *back).out


def test_a_template_without_weights_cannot_give_a_vision_tower(tmp_path, hf, converted):
    (converted / "release" / NOTES).unlink()
    (hf / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="holds no safetensors, and an export as"):
        megatron_to_hf(converted, hf, tmp_path / "back")
    with pytest.raises(ConversionError, match="give the folder with the weights"):
        plan_output(tmp_path / "out", hf, torch.bfloat16)


def test_a_language_model_alone_takes_the_tensors_of_the_template_too(tmp_path, hf, converted):
    """Its class ignores them; a folder of the whole model stays one for other programs."""
    config = json.loads((hf / "config.json").read_text())
    alone = {**config["text_config"], "architectures": ["Qwen3_5ForCausalLM"]}
    (hf / "config.json").write_text(json.dumps(alone))
    assert open_hf_model(hf).carried.keys() > {VISION}
    megatron_to_hf(converted, hf, tmp_path / "back")
    back = read_hf(tmp_path / "back")
    assert torch.equal(back[VISION], read_hf(hf)[VISION])
    assert "model.layers.0.linear_attn.A_log" in back
