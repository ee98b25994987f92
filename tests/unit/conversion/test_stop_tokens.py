"""The tokens at which an exported model stops: what is added, what stays, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.stop_tokens import plan_stop_tokens, trained_turn_end

REPOSITORY = Path(__file__).resolve().parents[3]
END_OF_TEXT, TURN_END = 151643, 151645
BASE = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "vocab_size": 151936}


@pytest.fixture
def template(tmp_path):
    """Writes generation_config.json of a template, or none."""

    def write(generation: dict[str, Any] | None) -> Path:
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return tmp_path

    return write


def test_the_end_of_a_turn_comes_before_the_stop_tokens_of_a_base(template):
    generation = {"eos_token_id": END_OF_TEXT, "do_sample": False, "max_new_tokens": 2048}
    stops = plan_stop_tokens(template(generation), BASE, TURN_END)
    assert stops.config == {**BASE, "eos_token_id": [TURN_END, END_OF_TEXT]}
    assert stops.generation == {**generation, "eos_token_id": [TURN_END, END_OF_TEXT]}
    assert stops.ids == (TURN_END, END_OF_TEXT)
    assert "names 151645, the token" in str(stops)
    assert str(stops).endswith("stops at [151645, 151643]")
    assert f"\n    {stops}\n" in (REPOSITORY / "docs" / "conversion.md").read_text()


@pytest.mark.parametrize("known", [TURN_END, [END_OF_TEXT, TURN_END]])
def test_files_that_name_the_token_stay_as_they_are(template, known):
    config = {**BASE, "eos_token_id": known}
    stops = plan_stop_tokens(template({"eos_token_id": known, "top_p": 0.8}), config, TURN_END)
    assert (stops.config, stops.generation, stops.added) == (config, None, None)


def test_a_file_that_lacks_the_token_gets_it_although_the_other_names_it(template):
    instruct = {**BASE, "eos_token_id": TURN_END}
    stops = plan_stop_tokens(template({"eos_token_id": END_OF_TEXT}), instruct, TURN_END)
    assert stops.config == instruct
    assert stops.generation == {"eos_token_id": [TURN_END, END_OF_TEXT]}
    assert stops.added == TURN_END


def test_a_folder_without_generation_config_gets_one_with_the_ids_of_config(template):
    stops = plan_stop_tokens(template(None), {**BASE, "pad_token_id": None}, TURN_END)
    assert stops.generation == {
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": [TURN_END, END_OF_TEXT],
    }
    known = {**BASE, "eos_token_id": TURN_END}
    assert plan_stop_tokens(template(None), known, TURN_END).generation is None


@pytest.mark.parametrize("generation", [{"top_k": 20}, {"eos_token_id": None, "top_k": 20}])
def test_a_generation_config_without_stop_tokens_gets_all_of_them(template, generation):
    stops = plan_stop_tokens(template(generation), {**BASE, "eos_token_id": TURN_END}, TURN_END)
    assert stops.generation == {"eos_token_id": [TURN_END], "top_k": 20}
    both = plan_stop_tokens(template(generation), BASE, TURN_END)
    assert both.generation == {"eos_token_id": [TURN_END, END_OF_TEXT], "top_k": 20}


def test_a_folder_without_any_stop_token_gets_one(template):
    stops = plan_stop_tokens(template(None), {"vocab_size": 8}, 7)
    assert stops.config == {"vocab_size": 8, "eos_token_id": [7]}
    assert stops.generation == {"eos_token_id": [7]}


def test_without_training_a_broken_file_is_not_looked_at(template):
    folder = template(None)
    (folder / "generation_config.json").write_text("{")
    config = {"eos_token_id": "</s>"}
    assert plan_stop_tokens(folder, config, None).config is config


@pytest.mark.parametrize("value", ["</s>", -1, 2.0, True, [2, "x"], {"id": 2}, [[2]]])
def test_what_is_no_token_id_is_refused_by_its_file(template, value):
    with pytest.raises(
        ConversionError, match=r"generation_config\.json: eos_token_id holds .*correct"
    ):
        plan_stop_tokens(template({"eos_token_id": value}), BASE, TURN_END)
    with pytest.raises(ConversionError, match=r"[^_]config\.json: eos_token_id holds"):
        plan_stop_tokens(template({}), {"eos_token_id": value}, TURN_END)


def test_the_token_is_read_from_the_record_of_a_run(tmp_path):
    assert trained_turn_end(tmp_path) is None
    file = tmp_path / "megatron_profit.json"
    for content, expected in (
        ({"run": {"tokenizer": {"turn_end_id": TURN_END}}}, TURN_END),
        ({"run": {"tokenizer": {"turn_end_id": None}}}, None),
        ({"run": {"tokenizer": {}}}, None),
        ({"run": 5}, None),
        ({}, None),
    ):
        file.write_text(json.dumps(content))
        assert trained_turn_end(tmp_path) == expected


@pytest.mark.parametrize("value", ["151645", -1, 1.5, True, [151645]])
def test_a_damaged_record_is_refused(tmp_path, value):
    file = tmp_path / "megatron_profit.json"
    file.write_text(json.dumps({"run": {"tokenizer": {"turn_end_id": value}}}))
    with pytest.raises(ConversionError, match=r"run\.tokenizer\.turn_end_id is .*damaged"):
        trained_turn_end(tmp_path)
