"""The model card of an export: facts, metadata, the licence of the base, and what it must not tell."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.model_card.base import HubId, licence_of
from checkpoint_conversion.model_card.card import card_files
from checkpoint_conversion.model_card.facts import RANDOM, Facts, read_facts
from checkpoint_conversion.model_card.next_steps import next_steps

RUN = {
    "objective": {
        "name": "profit",
        "options": {
            "prob_threshold": [0.1],
            "threshold_direction": "higher",
            "threshold_quantile": None,
        },
        "normalization": "supervised",
        "warmup_steps": 3,
    },
    "data": {
        "digest": "d1",
        "examples": 976,
        "supervised_tokens": 690000,
        "seq_length": 8192,
        "packing": True,
        "sources": ["/home/me/secret/chats.jsonl"],
        "files": [
            {"name": "chats.jsonl", "dataset": None, "sha256": "ab" * 32, "bytes": 1234567},
            {"name": "train.parquet", "dataset": "openai/gsm8k", "sha256": "cd" * 32, "bytes": 7},
        ],
    },
    "validation": {"valid_split": 0.02},
    "tokenizer": {"turn_end_id": None},
    "seed": {"seed": 1234},
    "model": {"base": "Qwen/Qwen3-14B-Base", "revision": "1cfa9a7", "folder": "14b", "start": None},
    "schedule": {
        "lr": 1e-05,
        "min_lr": 0.0,
        "lr_decay_style": "cosine",
        "lr_warmup_fraction": 0.1,
        "weight_decay": 0.0,
    },
    "batch": {"global_batch_size": 4},
    "optimizer": {"optimizer": "adam", "clip_grad": 1.0, "precision": "bf16"},
    "versions": {"megatron_profit": "0.1.0", "torch": "2.15.0"},
}
TOTALS = {
    "since": 0,
    "tokens": 820000,
    "supervised_tokens": 680000,
    "kept_tokens": 571000,
    "last": {"objective": 0.4123456789, "lm loss": 0.8},
    "last_steps": [21, 25],
}
FACTS = Facts(25, RUN, TOTALS, {"lm loss": 0.91, "kept fraction": 0.84})
APACHE = f"{' ' * 33}Apache License\n{' ' * 27}Version 2.0, January 2004\n"


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "14b"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\n---\n# Very own words of the base\n"
    )
    (folder / "LICENSE").write_text(APACHE)
    return folder


def card(facts: Facts, base: Path, **options) -> str:
    return card_files(facts, base, **options)["README.md"].decode()


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def rows(text: str) -> dict[str, list[str]]:
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in cells}


def test_the_metadata_are_what_the_hub_reads(base):
    from huggingface_hub import ModelCard

    text = card(FACTS, base)
    assert metadata(text) == {
        "base_model": "Qwen/Qwen3-14B-Base",
        "base_model_relation": "finetune",
        "datasets": ["openai/gsm8k"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["megatron-core", "megatron_profit", "sft", "profit"],
    }
    read = ModelCard(text)
    assert (read.data.base_model, read.data.license) == ("Qwen/Qwen3-14B-Base", "apache-2.0")
    assert "Very own words" not in text, "the card of the base"


def test_the_tables_hold_the_facts(base):
    found = rows(card(FACTS, base))
    assert found["revision of the base"] == ["`1cfa9a7`"]
    assert found["options"] == ["`prob_threshold` 0.1, `threshold_direction` higher"]
    assert found["steps"] == ["25"]
    assert found["step"] == ["4 packed rows of 8,192 tokens"]
    assert found["supervised tokens"] == ["680,000"]
    assert found["supervised tokens that the objective kept"] == ["571,000"]
    assert found["learning rate"] == ["1e-05 to 0, cosine"]
    assert found["`chats.jsonl`"] == ["", "1,234,567", f"`{'ab' * 32}`"]
    assert found["records"] == ["976"]
    assert found["share set aside for validation"] == ["0.02"]
    assert found["lm loss"] == ["0.8", "0.91"]
    assert found["kept fraction"] == ["", "0.84"]
    assert found["torch"] == ["2.15.0"]


def test_equal_facts_have_equal_cards_and_no_place_of_the_machine(base, tmp_path):
    text = card(FACTS, base)
    assert text == card(
        Facts(25, json.loads(json.dumps(RUN)), dict(TOTALS), FACTS.evaluation), base
    )
    for secret in ("/home/me", "secret", str(tmp_path)):
        assert secret not in text


def test_adapters_name_their_base_and_bring_its_licence(base):
    run = {**RUN, "lora": {"rank": 16, "alpha": 32, "targets": ["q_proj"]}}
    files = card_files(Facts(25, run), base, is_adapter=True)
    assert files.keys() == {"README.md", "LICENSE"}
    assert files["LICENSE"].decode() == APACHE
    text = files["README.md"].decode()
    assert (metadata(text)["library_name"], metadata(text)["base_model_relation"]) == (
        "peft",
        "adapter",
    )
    assert "lora" in metadata(text)["tags"]
    assert "PeftModel.from_pretrained(base" in text
    assert rows(text)["adapters"] == ["rank 16, alpha 32, targets q\\_proj"]


def test_an_adapter_is_opened_on_the_class_whose_names_it_has(base):
    """PEFT goes by names: on the language model alone, adapters of the whole model would do nothing."""
    for config, kind in (
        ("{}", "CausalLM"),
        ('{"text_config": null}', "CausalLM"),
        ('{"text_config": {}}', "ImageTextToText"),
    ):
        (base / "config.json").write_text(config)
        text = card_files(FACTS, base, is_adapter=True)["README.md"].decode()
        assert f"from transformers import AutoModelFor{kind}, PreTrainedTokenizerFast\n" in text
        assert f"base = AutoModelFor{kind}.from_pretrained" in text
        assert "AutoModelForCausalLM.from_pretrained" in card(FACTS, base), "a merged model"


def test_weights_that_no_run_has_trained_have_no_card(base, tmp_path):
    assert card_files(None, base) == {}
    with pytest.raises(
        ConversionError, match="--base-model-id Qwen/Qwen3-4B is for the model card"
    ):
        card_files(None, base, base_id=HubId("Qwen/Qwen3-4B"))
    assert read_facts(tmp_path) is None


def test_random_first_weights_are_no_further_training(base):
    run = {**RUN, "model": {**RUN["model"], "start": RANDOM}}
    text = card(Facts(25, run), base)
    assert not {"base_model", "license"} & metadata(text).keys()
    assert "trained from random weights" in text
    assert rows(text)["first weights"] == ["random weights"]


def test_an_earlier_record_gives_a_card_with_what_it_knows(base):
    text = card(Facts(7, {"objective": {"name": "sft"}, "model": {"digest": "x"}}), base)
    assert "base_model" not in metadata(text)
    assert rows(text)["base"] == ["`14b`"]
    assert "No metrics were recorded." in text
    assert card(Facts(7, {}), base)


def test_a_table_of_results_has_no_empty_column(base):
    without_training = card(Facts(7, RUN, {}, {"lm loss": 0.9}), base)
    assert "| metric | validation, after step 7 |" in without_training
    assert "training, step" not in without_training
    assert "| metric | training, step 21 to 25 |" in card(Facts(25, RUN, TOTALS), base)


def test_names_cannot_end_a_table_or_the_metadata(base):
    hostile = "a`|<b>\n---\nlicense: mit"
    run = {
        **RUN,
        "objective": {"name": hostile, "options": {hostile: hostile}},
        "model": {"base": hostile, "folder": hostile},
        "data": {"files": [{"name": hostile, "dataset": hostile}, "no file"]},
        "versions": {hostile: hostile},
    }
    text = card(Facts(1, run, {"last": {hostile: hostile}, "last_steps": 5}), base)
    assert metadata(text)["license"] == "apache-2.0"
    assert "base_model" not in metadata(text)
    assert "datasets" not in metadata(text)
    assert text.count("\n---\n") == 1
    assert "<b>" not in text.replace("`a'/<b>", "")


def test_adapters_bring_the_tokenizer_and_the_chat_template_of_their_training(base):
    """The base on the hub may have another template, or none."""
    ours = ("tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja")
    for name in (*ours, "trainer_state.json", "tokenizer.py"):
        (base / name).write_text(name)
    (base / "tokenizer").mkdir()
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("")
    ours += ("additional_chat_templates/tool_use.jinja",)
    files = card_files(FACTS, base, is_adapter=True)
    assert files.keys() == {"README.md", "LICENSE", *ours}
    assert files["chat_template.jinja"] == b"chat_template.jinja"
    assert "PreTrainedTokenizerFast.from_pretrained('FOLDER')" in files["README.md"].decode()
    assert card_files(FACTS, base).keys() == {"README.md"}
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.json").symlink_to(__file__)
    files = card_files(FACTS, base, is_adapter=True)
    assert files.keys() == {"README.md", "LICENSE"}
    assert "Fast.from_pretrained('Qwen/Qwen3-14B-Base')" in files["README.md"].decode()


def test_notes_with_a_damaged_stop_token_are_refused(base):
    run = {**RUN, "tokenizer": {"turn_end_id": "5"}}
    with pytest.raises(
        ConversionError, match=r"megatron_profit\.json: run\.tokenizer\.turn_end_id"
    ):
        card_files(Facts(25, run), base, is_adapter=True)


def test_adapters_bring_the_stop_tokens_that_their_base_does_not_name(base):
    """A base model stops at the end of a text, and its training in chats ends a turn with another token."""
    (base / "generation_config.json").write_text('{"eos_token_id": 5, "top_p": 0.9}')
    loading = 'GenerationConfig.from_pretrained("FOLDER")'
    for token, expected in ((7, {"eos_token_id": [7, 5], "top_p": 0.9}), (5, None), (None, None)):
        run = {**RUN, "tokenizer": {"turn_end_id": token}}
        files = card_files(Facts(25, run), base, is_adapter=True)
        found = files.get("generation_config.json")
        assert (None if found is None else json.loads(found)) == expected
        assert (loading in files["README.md"].decode()) is (expected is not None)
    assert "generation_config.json" not in card_files(Facts(25, run), base)


@pytest.mark.parametrize(
    ("card_of_base", "licence", "expected"),
    [
        ("---\nlicense: llama3.1\n---\n", "", ("llama3.1", "", "")),
        (
            "",
            "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version",
            ("llama3.1", "", "LICENSE"),
        ),
        ("", "META LLAMA 3 COMMUNITY LICENSE AGREEMENT", ("llama3", "", "LICENSE")),
        ("", "MIT License\n\nCopyright", ("mit", "", "LICENSE")),
        ("", "Qwen RESEARCH LICENSE AGREEMENT", ("other", "qwen-research", "LICENSE")),
        ("", "All rights reserved.", ("other", "of-the-base", "LICENSE")),
        ("", "", ("unknown", "", "")),
        (
            "---\nlicense: other\nlicense_name: q\nlicense_link: https://x.y\n---\n",
            "",
            ("other", "q", "https://x.y"),
        ),
        ("---\nlicense: [apache-2.0, mit]\n---\n", "", ("apache-2.0", "", "")),
        ("---\nlicense: {a: 1}\n---\n", APACHE, ("apache-2.0", "", "LICENSE")),
        ("---\nlicense: '../../x'\n---\n", "", ("unknown", "", "")),
        ("---\n" + "[" * 3000 + "\n---\n", "", ("unknown", "", "")),
        ("---\n&a [*a]: !!python/object/apply:os.system [x]\n---\n", "", ("unknown", "", "")),
        ("no metadata", "", ("unknown", "", "")),
    ],
)
def test_the_licence_is_the_cards_else_the_texts(base, card_of_base, licence, expected):
    (base / "README.md").write_text(card_of_base)
    (base / "LICENSE").write_text(licence) if licence else (base / "LICENSE").unlink()
    found = licence_of(base)
    assert (found.id, found.name, found.link) == expected


def test_llamas_terms_are_kept(base):
    (base / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    (base / "USE_POLICY.md").write_text("policy")
    (base / "NOTICE").write_text("notice")
    files = card_files(FACTS, base, is_adapter=True)
    assert files.keys() == {"README.md", "LICENSE", "USE_POLICY.md", "NOTICE"}
    text = files["README.md"].decode()
    assert "Built with Llama." in text
    assert metadata(text)["license_link"] == "LICENSE"


def test_long_texts_of_a_licence_are_known_by_their_beginning(base):
    (base / "README.md").write_text("---\nlicense: mit\n---\n" + "x" * (2 << 20))
    (base / "NOTICE").write_text("notice " * (1 << 18))
    assert licence_of(base).id == "mit"
    (base / "README.md").unlink()
    (base / "LICENSE").write_text(APACHE + "x" * (2 << 20))
    assert licence_of(base).id == "apache-2.0"
    files = card_files(FACTS, base, is_adapter=True)
    assert len(files["NOTICE"]) == 7 << 18
    assert len(files["LICENSE"]) == len(APACHE) + (2 << 20)


def test_of_a_base_with_foreign_links_only_the_licence_is_looked_at(base, tmp_path):
    """A folder of adapters takes no other file of the base."""
    (tmp_path / "elsewhere.txt").write_text(APACHE)
    (base / "vocab.txt").symlink_to(tmp_path / "elsewhere.txt")
    (base / "license").mkdir()
    assert licence_of(base).id == "apache-2.0"
    (base / "NOTICE").symlink_to(tmp_path / "elsewhere.txt")
    with pytest.raises(ConversionError, match=r"NOTICE is a link to .*elsewhere\.txt, outside"):
        licence_of(base)
    (base / "NOTICE").unlink()
    os.mkfifo(base / "NOTICE")
    with pytest.raises(ConversionError, match="NOTICE is a pipe"):
        licence_of(base)


def test_a_base_that_is_named_is_the_cards(base):
    text = card(FACTS, base, base_id=HubId("me/own", "v2"))
    assert metadata(text)["base_model"] == "me/own"
    assert rows(text)["revision of the base"] == ["`v2`"]


def test_a_folder_of_the_hubs_cache_tells_id_and_revision(tmp_path):
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-4B" / "snapshots" / "1cfa9a7"
    assert HubId.of_path(snapshot) == HubId("Qwen/Qwen3-4B", "1cfa9a7")
    data = tmp_path / "datasets--openai--gsm8k" / "snapshots" / "e53" / "main" / "x.parquet"
    assert HubId.of_path(data) == HubId("openai/gsm8k", "e53")
    assert HubId.of_path(tmp_path / "models--Qwen--Qwen3-4B" / "blobs" / "x") is None
    assert HubId.of_path(tmp_path) is None
    assert HubId.parse("Qwen/Qwen3-4B@main") == HubId("Qwen/Qwen3-4B", "main")
    for bad in ("", "a/b/c", "../x", "a@", "a b", "-x/y"):
        with pytest.raises(ConversionError, match="no id of the hub"):
            HubId.parse(bad)


@pytest.mark.parametrize(
    "content",
    ['{"run": 5}', '{"iteration": "x", "run": {}}', '{"iteration": 1, "run": {"data": 5}}'],
)
def test_damaged_notes_are_an_error_with_the_remedy(tmp_path, content):
    (tmp_path / "megatron_profit.json").write_text(content)
    with pytest.raises(ConversionError, match="without a model card"):
        read_facts(tmp_path)


def test_the_next_steps_can_be_pasted():
    lines = next_steps(Path("runs/my run/hf"), Path("Qwen3-4B"), ["chats.jsonl"])
    assert lines[0] == "> next, with runs/my run/hf:"
    assert lines[1].strip() == "megatron-profit chat 'runs/my run/hf'"
    assert [line.split()[1] for line in lines[1:]] == ["chat", "evaluate", "serve", "report"]
    for rank, space in ((4, 8), (16, 16), (20, 32)):
        adapter = next_steps(Path("out"), Path("Qwen3-4B"), rank=rank)
        assert adapter[-1].strip() == (
            f"vllm serve Qwen3-4B --enable-lora --max-lora-rank {space} --lora-modules trained=out"
        )
    assert "vllm" not in "".join(next_steps(Path("out"), Path("Qwen3-4B"), rank=1024)), "its limit"


def test_a_served_adapter_stops_as_its_folder_says(tmp_path):
    (tmp_path / "generation_config.json").write_text("{}")
    assert f"--generation-config {tmp_path}" in next_steps(tmp_path, Path("base"), rank=8)[-1]


def test_the_next_steps_write_the_day_and_read_the_records_of_the_training():
    data = ["chats.jsonl", "--data-columns", "prompt=question", "--template-date", "2026-01-02"]
    lines = next_steps(Path("hf"), Path("base"), data, day="2026-01-02")
    assert lines[2].endswith("--template-date 2026-01-02")
    assert " ".join(data) in lines[-1]
