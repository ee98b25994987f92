"""A model folder with another chat template."""

from __future__ import annotations

import json
import types
from pathlib import Path

import jinja2
import pytest

from checkpoint_conversion.engine.regular_files import MOST_JSON
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.writer import artifacts
from megatron_profit.launch.chat_template import CHATML, has_template, with_template
from megatron_profit.recipe.errors import LaunchError


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text('{"added_tokens": ["<|im_start|>", "<|im_end|>"]}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "old", "eos_token": "x"}')
    (folder / "chat_template.json").write_text('{"chat_template": "old"}')
    return folder


def test_the_folder_links_to_the_model_and_has_the_template(model, tmp_path):
    folder = with_template(model, "chatml", tmp_path / "run")
    assert with_template(model, "chatml", tmp_path / "run") == folder, "of the first start"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [folder.name]
    assert (folder / "chat_template.jinja").read_text() == CHATML
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"eos_token": "x"}
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (folder / "model.safetensors").is_symlink()
    assert not (folder / "chat_template.json").exists()


def test_a_template_of_the_models_own_is_seen_in_each_of_its_places(model):
    """A recipe's template then takes its place, which the command says."""
    assert has_template(model)
    (model / "chat_template.json").unlink()
    assert has_template(model)
    (model / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    assert not has_template(model)
    (model / "chat_template.jinja").write_text(CHATML)
    assert has_template(model)


def test_weights_of_other_formats_are_links_whatever_their_size(model, tmp_path):
    for name in ("pytorch_model.bin", "model-q4.gguf", "tf_model.h5"):
        with (model / name).open("wb") as file:
            file.truncate(MOST_JSON + 1)
    folder = with_template(model, "chatml", tmp_path / "model")
    assert (folder / "model-q4.gguf").is_symlink()
    names = [file.name for file in artifacts(folder)]
    assert not {"pytorch_model.bin", "model-q4.gguf", "tf_model.h5"} & set(names), "not exported"


def test_a_large_file_of_another_kind_is_named_before_anything_is_written(model, tmp_path):
    with (model / "corpus.tar").open("wb") as file:
        file.truncate(MOST_JSON + 1)
    with pytest.raises(LaunchError, match=r"corpus\.tar has 100,000,001 bytes .*; move it out"):
        with_template(model, "chatml", tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1, "a": 2}'])
def test_broken_settings_of_the_tokenizer_are_named(model, tmp_path, text):
    (model / "tokenizer_config.json").write_text(text)
    with pytest.raises(ConversionError, match=r"tokenizer_config\.json"):
        with_template(model, "chatml", tmp_path / "model")


def test_another_template_or_model_gets_a_folder_of_its_own(model, tmp_path):
    first = with_template(model, "chatml", tmp_path / "run")
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages }}")
    other = with_template(model, str(own), tmp_path / "run")
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "generation_config.json").write_text("{}")
    renamed = with_template(model, "chatml", tmp_path / "run")
    assert len({first, other, renamed}) == 3
    assert before.keys() == {path.name for path in first.iterdir()}
    assert not (other / "generation_config.json").exists()
    assert [path.name for path in renamed.glob("*.safetensors")] == [
        "model-00001-of-00001.safetensors"
    ]


def test_a_model_in_the_runs_folder_stays_as_it_is(model, tmp_path):
    own = model.rename(tmp_path / "model")
    folder = with_template(own, "chatml", tmp_path)
    assert not (own / "model.safetensors").is_symlink()
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_two_nodes_that_make_the_folder_do_not_disturb_each_other(model, tmp_path, monkeypatch):
    symlink_to, others = Path.symlink_to, iter(["the other node"])

    def both(link, file):
        symlink_to(link, file)
        for _ in others:
            with_template(model, "chatml", tmp_path / "run")

    monkeypatch.setattr(Path, "symlink_to", both)
    folder = with_template(model, "chatml", tmp_path / "run")
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [folder.name]


def test_a_file_may_hold_the_template(model, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    folder = with_template(model, str(file), tmp_path / "model")
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_byte_order_mark_is_no_part_of_the_template(model, tmp_path):
    (tmp_path / "own.jinja").write_text("\ufeff{{ bos_token }}", encoding="utf-8")
    folder = with_template(model, str(tmp_path / "own.jinja"), tmp_path / "model")
    assert (folder / "chat_template.jinja").read_text() == "{{ bos_token }}"


def test_chatml_needs_its_tokens(model, tmp_path):
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(LaunchError, match=r"has no token <\|im_start\|> or <\|im_end\|>"):
        with_template(model, "chatml", tmp_path / "model")


def test_chatml_writes_turns_as_it_is_known():
    messages = [
        types.SimpleNamespace(role=role, content=text)
        for role, text in (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"))
    ]
    text = jinja2.Template(CHATML, trim_blocks=True).render(messages=messages)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
    )
    prompt = jinja2.Template(CHATML).render(messages=messages[:1], add_generation_prompt=True)
    assert prompt.strip().endswith("<|im_start|>assistant")
