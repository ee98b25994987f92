"""Masks: exactly what the model must produce, under templates that differ as real ones do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_profit.data import BrokenRecord, ChatRenderer, DataError
from megatron_profit.data.render import control_tokens
from megatron_profit.data.render import renderer as render

QUESTION, ANSWER = ("user", "What is the answer?"), ("assistant", "It is é 😀 forty-two.")
AGAIN, LAST = ("user", "And the question?"), ("assistant", "\tUnknown. ")
TEMPLATE_NAMES = ["chatml", "chatml_generation", "thinking", "llama3", "plain"]


@pytest.mark.parametrize(
    ("name", "header", "end", "opening"),
    [
        ("chatml", "<|im_start|>assistant\n", "<|im_end|>", "<|im_start|>"),
        ("thinking", "<|im_start|>assistant\n", "<|im_end|>", "<|im_start|>"),
        (
            "llama3",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
            "<|start_header_id|>",
        ),
        ("plain", "ASSISTANT: ", "</s>", ""),
    ],
)
def test_markers_are_learnt(make_tokenizer, templates, name, header, end, opening):
    markers = ChatRenderer(make_tokenizer(getattr(templates, name))).markers
    assert (markers.header, markers.end, markers.opening) == (header, end, opening)


@pytest.mark.parametrize(
    ("end", "token"),
    [
        ("<|im_end|>", "<|im_end|>"),
        ("\\n<|im_end|>\\n<|endoftext|>", "<|im_end|>"),
        ("</s>", "</s>"),
        ("### End", None),
    ],
)
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_the_token_that_ends_a_turn_is_known(make_tokenizer, templates, end, token, trim_offsets):
    template = templates.chatml.replace("<|im_end|>", end)
    tokenizer = make_tokenizer(template, trim_offsets=trim_offsets)
    expected = None if token is None else tokenizer.convert_tokens_to_ids(token)
    assert ChatRenderer(tokenizer).markers.end_id == expected


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_ids_equal_those_of_the_tokenizer(
    make_tokenizer, templates, conversation, name, trim_offsets
):
    tokenizer = make_tokenizer(getattr(templates, name), trim_offsets=trim_offsets)
    talk = conversation(QUESTION, ANSWER, AGAIN, LAST)
    rendered = ChatRenderer(tokenizer).render(talk)
    assert rendered.ids.dtype == np.int32
    assert rendered.ids.tolist() == tokenizer.apply_chat_template(talk.messages, return_dict=False)


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_chatml_trains_each_answer_and_its_end(
    make_tokenizer, templates, conversation, supervised_texts, trim_offsets
):
    tokenizer = make_tokenizer(templates.chatml, trim_offsets=trim_offsets)
    talk = conversation(("system", "Be brief."), QUESTION, ANSWER, AGAIN, LAST)
    texts = supervised_texts(tokenizer, ChatRenderer(tokenizer).render(talk))
    assert texts == ["It is é 😀 forty-two.<|im_end|>", "\tUnknown. <|im_end|>"]


def test_mask_equals_that_of_the_generation_keyword(make_tokenizer, templates, conversation):
    tokenizer = make_tokenizer(templates.chatml_generation)
    talk = conversation(("system", "Be brief."), QUESTION, ANSWER, LAST, AGAIN, LAST, AGAIN)
    reference = tokenizer.apply_chat_template(
        talk.messages, return_dict=True, return_assistant_tokens_mask=True
    )
    rendered = ChatRenderer(tokenizer).render(talk)
    assert rendered.supervised.tolist() == [bool(m) for m in reference["assistant_masks"]]


def test_a_turn_is_trained_from_where_the_generation_prompt_ends(
    make_tokenizer, templates, conversation, supervised_texts
):
    """The template opens the think block of the last answer in the prompt; an earlier answer has none."""
    tokenizer = make_tokenizer(templates.thinking)
    thought = {"role": "assistant", "content": "It is sunny.", "reasoning_content": "Let me think."}
    texts = supervised_texts(
        tokenizer, ChatRenderer(tokenizer).render(conversation(QUESTION, thought, AGAIN, thought))
    )
    assert texts == [
        "It is sunny.<|im_end|>",
        "Let me think.\n</think>\n\nIt is sunny.<|im_end|>",
    ]


def test_llama3_trims_and_ends_with_its_own_token(
    make_tokenizer, templates, conversation, supervised_texts
):
    tokenizer = make_tokenizer(templates.llama3, trim_offsets=True, eos_token="<|eot_id|>")
    talk = conversation(QUESTION, ANSWER, AGAIN, LAST)
    texts = supervised_texts(tokenizer, ChatRenderer(tokenizer).render(talk))
    assert texts == ["It is é 😀 forty-two.<|eot_id|>", "Unknown.<|eot_id|>"]


def test_a_turn_that_ends_otherwise_does_not_run_into_the_next(
    make_tokenizer, templates, conversation
):
    call = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {}}]}
    talk = conversation(QUESTION, call, ("tool", "sunny"), ANSWER)
    with pytest.raises(BrokenRecord) as error:
        ChatRenderer(make_tokenizer(templates.llama3)).render(talk)
    assert error.value.reason == render.TURNS_NOT_FOUND


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_header_that_ends_in_a_space_is_never_trained(
    make_tokenizer, templates, conversation, supervised_texts, trim_offsets
):
    tokenizer = make_tokenizer(templates.plain, trim_offsets=trim_offsets)
    # Before a letter the space would be part of the first word; before a tab it is a token.
    talk = conversation(QUESTION, ("assistant", "\n# Heading\n### More"), AGAIN, LAST)
    texts = supervised_texts(tokenizer, ChatRenderer(tokenizer).render(talk))
    assert texts == ["\n# Heading\n### More</s>", "\tUnknown. </s>"]


def test_plain_text_that_headers_share_may_stand_in_an_answer(
    make_tokenizer, templates, conversation, supervised_texts
):
    template = templates.plain.replace("USER: ", "### Ask:\\n").replace(
        "ASSISTANT: ", "### Say:\\n"
    )
    tokenizer = make_tokenizer(template)
    talk = conversation(QUESTION, ("assistant", "### Heading"), AGAIN, LAST)
    texts = supervised_texts(tokenizer, ChatRenderer(tokenizer).render(talk))
    assert texts == ["### Heading</s>", "\tUnknown. </s>"]


def test_a_token_that_begins_in_the_header_is_not_trained(
    make_tokenizer, templates, conversation, supervised_texts
):
    tokenizer = make_tokenizer(templates.chatml)
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    rendered = ChatRenderer(tokenizer).render(conversation(QUESTION, ("assistant", "\n\nYes.")))
    # Of the header's newline and the answer's two, the first two are one token.
    assert supervised_texts(tokenizer, rendered) == ["\nYes.<|im_end|>"]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.text(), st.text().map("A{}".format)), min_size=1, max_size=3))
def test_any_text_is_trained_whole(
    renderer, small_tokenizer, conversation, supervised_texts, pairs
):
    talk = conversation(*[t for q, a in pairs for t in (("user", q), ("assistant", a))])
    texts = supervised_texts(small_tokenizer, renderer.render(talk))
    assert texts == [f"{answer}<|im_end|>" for _, answer in pairs]


def test_end_is_trained_where_pad_and_end_are_one_token(make_tokenizer, templates, conversation):
    tokenizer = make_tokenizer(templates.chatml, pad_token="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rendered = ChatRenderer(tokenizer).render(conversation(QUESTION, ANSWER))
    trained = rendered.ids[rendered.supervised]
    assert trained[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "<|im_start|>assistant\nhi"), ANSWER],
        [("system", "<|im_start|>assistant\n"), QUESTION, ANSWER],
        [QUESTION, ("assistant", "Say <|im_end|> to end.")],
        [QUESTION, {"role": "assistant", "content": "a", "reasoning_content": "<|im_end|>"}],
        [("user", "hello<|im_end|>\n<|im_start|>assistant"), ANSWER],
        [("user", "What is <|im_end|>?"), ANSWER],
        [("system", "<|im_start|>"), QUESTION, ANSWER],
        [QUESTION, ("assistant", "<|im_start|>user\nhi")],
        [QUESTION, ("tool", "<|im_end|>"), ANSWER],
    ],
)
def test_markers_in_a_text_skip_the_record(renderer, conversation, turns):
    with pytest.raises(BrokenRecord) as error:
        renderer.render(conversation(*turns))
    assert error.value.reason == control_tokens.MARKER_IN_TEXT


def test_an_end_of_plain_text_is_harmless_in_a_question(
    make_tokenizer, templates, conversation, supervised_texts
):
    tokenizer = make_tokenizer(templates.chatml.replace("<|im_end|>", "###"))
    talk = conversation(("user", "What is ###?"), ANSWER)
    texts = supervised_texts(tokenizer, ChatRenderer(tokenizer).render(talk))
    assert texts == ["It is é 😀 forty-two.###"]


def test_a_template_that_drops_a_turn_skips_the_record(make_tokenizer, templates, conversation):
    template = templates.chatml.replace(
        "in messages %}", "in messages if message.content != 'no' %}"
    )
    talk = conversation(QUESTION, ("assistant", "no"), AGAIN, LAST)
    with pytest.raises(BrokenRecord) as error:
        ChatRenderer(make_tokenizer(template)).render(talk)
    assert error.value.reason == render.TURNS_NOT_FOUND


@pytest.mark.parametrize("failure", ["raise_exception('no tools')", "1 / 0", "tools.x.y"])
def test_a_template_that_refuses_skips_the_record(make_tokenizer, templates, conversation, failure):
    template = templates.chatml + "{%- if tools %}{{ " + failure + " }}{%- endif %}"
    with pytest.raises(BrokenRecord) as error:
        ChatRenderer(make_tokenizer(template)).render(
            conversation(QUESTION, ANSWER, tools=[{"name": "f"}])
        )
    assert error.value.reason == render.TEMPLATE_FAILED


@pytest.mark.parametrize(
    ("find", "replace", "said"),
    [
        ("'<|im_end|>\\n'", "'\\n'", "no end of turn"),
        ("'<|im_end|>\\n'", "('' if loop.last else '<|im_end|>\\n')", "no end of turn"),
        ("'<|im_start|>' + message.role + '\\n' + ", "", "no header"),
        ("'<|im_start|>assistant\\n'", "''", "no header"),
        ("+ message.content", "+ message.content[:2]", "cannot render"),
        ("{%- for", "{{ raise_exception('never') }}{%- for", "cannot render"),
        ("{%- for", "{%- fro", "cannot render"),
    ],
)
def test_useless_templates_are_refused_at_once(make_tokenizer, templates, find, replace, said):
    assert find in templates.chatml
    tokenizer = make_tokenizer(templates.chatml.replace(find, replace))
    with pytest.raises(DataError, match=said):
        ChatRenderer(tokenizer)


@pytest.mark.parametrize("space", ["", " "])
def test_answers_right_after_the_question_are_named(make_tokenizer, space):
    # Mistral's: no header tells the model to answer.
    template = """\
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{{- 'SPACE' + message.content + '</s>' }}{%- endif %}
{%- endfor %}"""
    with pytest.raises(
        DataError, match=r"follows ' \[/INST\]', the end of a question.*header of its"
    ):
        ChatRenderer(make_tokenizer(template.replace("SPACE", space)))


def test_tokenizers_without_template_or_offsets_are_refused(make_tokenizer, templates):
    with pytest.raises(DataError, match="has no chat template"):
        ChatRenderer(make_tokenizer(None))

    class Slow:
        is_fast = False
        chat_template = templates.chatml

    with pytest.raises(DataError, match="slow tokenizer"):
        ChatRenderer(Slow())
