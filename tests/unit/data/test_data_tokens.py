"""Control tokens that a record's text would become, and text that a tokenizer drops."""

import io
import json
import logging

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_profit.data import (
    BrokenRecord,
    ChatRenderer,
    DataError,
    DataSource,
    Preparation,
    build_examples,
    load_tokenizer,
)
from megatron_profit.data.render import control_tokens
from megatron_profit.data.render import renderer as render
from megatron_profit.data.render.token_loss import uncovered
from megatron_profit.data.store import cache

QUESTION, ANSWER = ("user", "What is the answer?"), ("assistant", "It is forty-two.")
ENDS = "<|endoftext|>"


@pytest.mark.parametrize(
    "turns",
    [
        [("user", f"What is {ENDS}?"), ANSWER],
        [("system", ENDS), QUESTION, ANSWER],
        [QUESTION, ("tool", f"a{ENDS}b"), ANSWER],
        [QUESTION, ("assistant", f"The end.{ENDS}")],
        [QUESTION, {"role": "assistant", "content": "a", "reasoning_content": ENDS}],
        [QUESTION, {"role": "tool", "content": "a", "name": ENDS}, ANSWER],
        [
            QUESTION,
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": [{ENDS: 1}]}}]},
        ],
        [("user", "</s>"), ANSWER],
        [("user", "<|eot_id|>"), ANSWER],
    ],
)
def test_a_special_token_in_a_text_leaves_the_record_out(renderer, conversation, turns):
    with pytest.raises(BrokenRecord) as error:
        renderer.render(conversation(*turns))
    assert error.value.reason == control_tokens.SPECIAL_IN_TEXT


def test_a_special_token_in_a_tool_leaves_the_record_out(renderer, conversation):
    tool = {"name": "f", "parameters": {"description": f"Give {ENDS}."}}
    with pytest.raises(BrokenRecord) as error:
        renderer.render(conversation(QUESTION, ANSWER, tools=[tool]))
    assert error.value.reason == control_tokens.SPECIAL_IN_TEXT


def test_added_tokens_that_are_not_special_and_thoughts_may_stand_in_texts(
    make_tokenizer, templates, conversation
):
    tokenizer = make_tokenizer(templates.chatml)
    tokenizer.add_tokens(["<tool_call>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "[PLAN]"]})
    talk = conversation(("user", "<tool_call> <think>"), ("assistant", "<think>a</think>b"))
    rendered = ChatRenderer(tokenizer).render(talk)
    ids = tokenizer.apply_chat_template(talk.messages, return_dict=False)
    assert rendered.ids.tolist() == ids
    planned = conversation(QUESTION, ("assistant", "[PLAN] It is."))
    with pytest.raises(BrokenRecord):
        ChatRenderer(tokenizer).render(planned)
    plan = tokenizer.convert_tokens_to_ids("[PLAN]")
    rendered = ChatRenderer(tokenizer, allowed_tokens=["[PLAN]"]).render(planned)
    assert rendered.ids[rendered.supervised][0] == plan


def test_control_tokens_that_are_not_special_are_counted(make_tokenizer, templates, conversation):
    tokenizer = make_tokenizer(templates.chatml + "{#- <|tool|> #}")
    tokenizer.add_tokens(["<|fim_prefix|>", "<|tool|>", "<b>", "\n\n"])
    renderer = ChatRenderer(tokenizer)

    def found(text):
        finding = renderer.render(conversation(("user", text), ANSWER)).findings[
            control_tokens.UNMARKED_IN_TEXT
        ]
        return finding.count, finding.detail

    assert found("<|fim_prefix|>def") == (1, "'<|fim_prefix|>'")
    assert found("<|tool|> <b>\n\n<|none|>") == (0, "")


def test_a_token_that_begins_a_question_is_a_marker(make_tokenizer, conversation):
    """DeepSeek-R1's token of the user is not special, and differs from the header of an answer."""
    template = (
        "{% for m in messages %}{{ '<|user|>' + m.content if m.role == 'user' else "
        "'<|answer|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|answer|>' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens(["<|user|>", "<|answer|>"])
    for turns in ((("user", "a <|user|>"), ANSWER), (QUESTION, ("assistant", "b<|user|>c"))):
        with pytest.raises(BrokenRecord, match=control_tokens.MARKER_IN_TEXT):
            ChatRenderer(tokenizer).render(conversation(*turns))


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("<nothing>", "<nothing>: no special token of .* these are </s>, <|begin_of_text|>"),
        ("<|im_end|>", "begins or ends turns with this token"),
        ("<|im_start|>", "begins or ends turns with this token"),
    ],
)
def test_only_special_tokens_besides_markers_can_be_allowed(small_tokenizer, token, said):
    with pytest.raises(DataError, match=said.replace("|", r"\|")):
        ChatRenderer(small_tokenizer, allowed_tokens=[token])


# Letters, digits and what the template writes, each a token; other characters are unknown, or dropped.
KNOWN = "abcdefghijklmnopqrstuvwxyzAEIQSUW0123456789?.\n"


def by_letters(template, unknown="<unk>", **parts):
    """A tokenizer without tokens for bytes."""
    words = {letter: i for i, letter in enumerate(KNOWN)}
    model = models.BPE({**words, "<unk>": len(words)}, [], unk_token=unknown)
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    found.chat_template = template
    return found


def test_text_without_a_token_is_counted_in_a_question(templates, conversation):
    renderer = ChatRenderer(by_letters(templates.chatml))
    rendered = renderer.render(conversation(("user", "what is €?"), ("assistant", "It")))
    finding = rendered.findings[render.TEXT_DROPPED]
    assert (finding.count, finding.of) == (1, 1)
    assert "€" in finding.detail
    known = renderer.render(conversation(("user", "what?"), ("assistant", "It")))
    assert known.findings[render.TEXT_DROPPED].count == 0


def test_text_without_a_token_is_never_trained(templates, conversation):
    renderer = ChatRenderer(by_letters(templates.chatml))
    with pytest.raises(BrokenRecord) as error:
        renderer.render(conversation(("user", "what?"), ("assistant", "5€.")))
    assert (error.value.reason, error.value.detail) == (render.UNKNOWN_TRAINED, "'€'")


def test_the_unknown_token_of_a_unigram_model_is_known(templates, conversation):
    pieces = [("<unk>", 0.0), *((letter, -1.0) for letter in KNOWN)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)), eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = templates.chatml
    renderer = ChatRenderer(tokenizer)
    rendered = renderer.render(conversation(("user", "what €?"), ("assistant", "It")))
    assert rendered.findings[render.TEXT_DROPPED].count == 1
    with pytest.raises(BrokenRecord):
        renderer.render(conversation(("user", "what?"), ("assistant", "5€")))


def test_an_end_of_turn_that_is_the_unknown_token_too_is_trained(
    make_tokenizer, templates, conversation
):
    tokenizer = make_tokenizer(templates.chatml, unk_token="<|im_end|>")
    rendered = ChatRenderer(tokenizer).render(conversation(QUESTION, ANSWER))
    assert rendered.ids[rendered.supervised][-1] == tokenizer.unk_token_id
    assert rendered.findings[render.TEXT_DROPPED].count == 0


@pytest.mark.parametrize(
    ("parts", "dropped", "told"),
    [
        ({}, "€", "?€"),  # its offsets go on as if no character had been dropped
        ({"normalizer": normalizers.Replace("x", "")}, "x", "xx"),
        ({"pre_tokenizer": pre_tokenizers.Split("y?", "removed")}, "y?", "y?y?"),
    ],
)
def test_text_that_vanishes_is_counted(templates, conversation, parts, dropped, told):
    tokenizer = by_letters(templates.chatml, unknown=None, **parts)
    rendered = ChatRenderer(tokenizer).render(
        conversation(("user", f"why{dropped}?"), ("assistant", f"It{dropped}"))
    )
    finding = rendered.findings[render.TEXT_DROPPED]
    assert (finding.count, finding.detail) == (1, repr(told))


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_a_tokenizer_that_knows_no_text_is_refused(templates, unknown):
    empty = Tokenizer(models.BPE({"<unk>": 0}, [], unk_token=unknown))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=empty, unk_token=unknown, eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = templates.chatml
    with pytest.raises(DataError, match=r"drops text: of .*7vAsk7.* it knows no token"):
        ChatRenderer(tokenizer)


def test_marks_and_spaces_that_go_with_a_letter_are_not_dropped():
    assert uncovered("o\u0308 e", [(0, 1), (3, 4)]) == ""
    assert uncovered("\u1100\u1161\u11a8", [(0, 1)]) == ""
    assert uncovered("ab", [(0, 1)]) == "b"
    assert uncovered("abc", [(1, 2)]) == "ac"
    assert uncovered("é", [(0, 1), (0, 1)]) == ""
    assert uncovered("a", []) == "a"


def test_real_text_of_any_script_is_covered(qwen3):
    rng = np.random.default_rng(0)
    letters = "ab \n\te\u0301\u0327\u1100\u1161\u11a8각\u0928\u093c\u200d👩🏽🇩🇪\x00\x1b\u212bⅧ漢\u0f73\u0344"
    texts = ["".join(rng.choice(list(letters), 12)) for _ in range(500)]
    for text, encoding in zip(texts, qwen3(texts)._encodings, strict=True):
        assert uncovered(text, encoding.offsets) == ""


@pytest.fixture
def folder(small_tokenizer, tmp_path):
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_folder_without_tokenizer_json_says_so(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        DataError, match=r"has no tokenizer\.json.*holds \['chat_template.jinja', 'token"
    ):
        load_tokenizer(folder)
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(DataError, match=r"has no tokenizer\.json.*'vocab\.json'"):
        load_tokenizer(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        load_tokenizer(tmp_path / "empty")


@pytest.mark.parametrize(
    "text", ["", "{}", "version https://git-lfs.github.com/spec/v1\n", "[" * 9999]
)
def test_a_damaged_tokenizer_json_is_named(folder, text):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(
        DataError, match=rf"cannot be loaded .* tokenizer\.json has {len(text):,} bytes"
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize("length", [[], {}, "many"])
def test_a_setting_that_no_text_can_be_tokenized_with_is_named(folder, length):
    change_settings(folder, model_max_length=length)
    with pytest.raises(DataError, match=r"its tokenizer cannot be loaded \(TypeError"):
        load_tokenizer(folder)


def test_what_the_library_logs_of_a_file_is_printable(folder):
    output = io.StringIO()
    logger, handler = logging.getLogger("transformers"), logging.StreamHandler(output)
    logger.addHandler(handler)
    try:
        load_tokenizer(folder)
        logger.warning("model_type is %s", "\x1b[31mqwen\nINFO")
    finally:
        logger.removeHandler(handler)
    assert output.getvalue() == "model_type is \\x1b[31mqwen\\nINFO\n"


def test_code_in_the_folder_is_not_run(folder, tmp_path):
    change_settings(folder, tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    assert load_tokenizer(folder).is_fast
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("model_type", "named"),
    [
        ("llama", "GPT2Tokenizer"),
        ("qwen2", "LlamaTokenizerFast"),
        ("qwen3_5_text", "Qwen2Tokenizer"),
    ],
)
def test_text_is_split_as_tokenizer_json_says(folder, model_type, named):
    # transformers' classes of these names put their own splitting in place of the file's.
    whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
    letters = pre_tokenizers.Split(Regex("."), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole.pre_tokenizer = pre_tokenizers.Sequence([letters, bytes_only])
    whole.save(str(folder / "tokenizer.json"))
    change_settings(folder, tokenizer_class=named)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    text = "What is the answer?"
    assert len(load_tokenizer(folder)(text).input_ids) == len(text)


def change_settings(folder, **settings):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_empty_vocabulary_ends_the_preparation(folder, tmp_path, write_lines, workers):
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["model"] |= {"vocab": {}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    source = DataSource(str(write_lines([{"instruction": "q", "output": "a"}] * 300)))
    with pytest.raises(DataError, match="drops text"):
        cache.load_or_build([source], folder, Preparation(64), tmp_path / "cache", workers=workers)


def test_what_was_dropped_is_in_the_report(templates, write_lines):
    records = [{"instruction": text, "output": "It"} for text in ("what?", "5€?", "7$?", "why")]
    path = write_lines([*records, {"instruction": "why", "output": "5€"}])
    _, report = build_examples(path, ChatRenderer(by_letters(templates.chatml)), 64)
    found = report.found[render.TEXT_DROPPED]
    assert (found.count, found.of) == (2, 4)
    assert found.places == [f"{path}, line 2", f"{path}, line 3"]
    assert report.skipped[render.UNKNOWN_TRAINED].places == [f"{path}, line 5"]
    told = f"WARNING: {render.TEXT_DROPPED}: 2 of 4 examples ({path}, line 2; {path}, line 3)"
    assert told in str(report).splitlines()
