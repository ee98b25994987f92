"""Formats: every accepted spelling of a record, and the reasons for leaving one out."""

import json

import pytest

from megatron_profit.data import BrokenRecord, DataError, RawRecord, normalise
from megatron_profit.data.chat import conversations as chat
from megatron_profit.data.chat import masks, messages
from megatron_profit.data.files import fields


def conversation_of(value):
    return normalise(RawRecord(value, "data.jsonl", 7, "line"))


def turns_of(value):
    return [(m["role"], m["content"]) for m in conversation_of(value).messages]


QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def test_alpaca_joins_instruction_and_input_with_a_newline():
    record = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert turns_of(record) == [("user", "Add.\n1 2"), ("assistant", "3")]


@pytest.mark.parametrize("empty", [{"input": ""}, {"input": None}, {}])
def test_alpaca_without_input(empty):
    record = {"instruction": "Hi.", "output": "Ho.", **empty}
    assert turns_of(record) == [("user", "Hi."), ("assistant", "Ho.")]


def test_alpaca_system_and_history_come_first():
    record = {
        "instruction": "q2",
        "output": "a2",
        "system": "Be brief.",
        "history": [["q0", "a0"], ["q1", "a1"]],
    }
    assert turns_of(record) == [
        ("system", "Be brief."),
        *[("user", "q0"), ("assistant", "a0"), ("user", "q1"), ("assistant", "a1")],
        *[("user", "q2"), ("assistant", "a2")],
    ]


def test_sharegpt_roles():
    record = {
        "system": "Be brief.",
        "tools": json.dumps([TOOL["function"]]),
        "conversations": [
            {"from": "human", "value": "1 + 0?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "One."},
        ],
    }
    conversation = conversation_of(record)
    assert [m["role"] for m in conversation.messages] == [
        *["system", "user", "assistant", "tool", "assistant"]
    ]
    assert conversation.messages[2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert conversation.tools == [TOOL]


def test_a_system_message_of_its_own_stands_instead_of_the_field():
    record = {"system": "field", "messages": [{"role": "system", "content": "own"}, ANSWER]}
    assert turns_of(record)[0] == ("system", "own")


def test_fields_may_be_spelt_either_way_under_either_key():
    expected = [("user", "q"), ("assistant", "a")]
    spelt = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]
    assert turns_of({"messages": spelt}) == expected
    assert turns_of({"conversations": [{"role": "human", "content": "q"}, ANSWER]}) == expected


def test_content_parts_are_joined():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert turns_of({"messages": [{"role": "user", "content": parts}, ANSWER]})[0][1] == "one two"


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_tool_calls_as_the_api_returns_them(arguments, content):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    answer = {"role": "assistant", "tool_calls": [call], **content}
    result = {"role": "tool", "content": "1", "tool_call_id": "c1", "name": None}
    messages = conversation_of({"messages": [answer, result]}).messages
    assert messages[0] == {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALL}]}
    assert messages[1] == {"role": "tool", "content": "1", "tool_call_id": "c1"}


@pytest.mark.parametrize(("given", "kept"), [("why", True), ("", False), (None, False)])
def test_reasoning_is_kept_unless_it_is_empty(given, kept):
    message = conversation_of({"messages": [{**ANSWER, "reasoning_content": given}]}).messages[0]
    assert ("reasoning_content" in message) == kept


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning": "why"},
        {"thinking": "why"},
        {"reasoning_content": "why", "reasoning": "other", "thinking": 3},
        {"reasoning_content": "", "thinking": "why"},
    ],
)
def test_reasoning_under_other_names(fields):
    (message,) = conversation_of({"messages": [{**ANSWER, **fields}]}).messages
    assert message == {**ANSWER, "reasoning_content": "why"}


@pytest.mark.parametrize(
    "given",
    [
        {"type": "function", **TOOL["function"]},
        {"type": None, **TOOL["function"]},
        {"type": "function", "name": "add", "parameters": "{}"},
        {"type": "function", "function": json.dumps(TOOL["function"])},
    ],
)
def test_flat_tools_are_functions(given):
    """OpenAI's Responses API has the type next to the name."""
    assert conversation_of({"messages": [ANSWER], "tools": [given]}).tools == [TOOL]


def test_a_tool_of_another_kind_stays_and_a_function_needs_a_name():
    other = {"type": "web_search", "user_location": {"city": "Rome"}}
    assert conversation_of({"messages": [ANSWER], "tools": [other]}).tools == [other]
    with pytest.raises(BrokenRecord, match="a tool has no name"):
        conversation_of({"messages": [ANSWER], "tools": [{"type": "function", "parameters": {}}]})


@pytest.mark.parametrize("record", [{}, {"question": "q", "answer": "a"}, {"prompt": "p"}])
def test_unknown_format_names_place_keys_and_known_formats(record):
    with pytest.raises(DataError) as error:
        normalise(RawRecord(record, "data.jsonl", 7, "line", first=True))
    for part in ["data.jsonl, line 7", *record, "alpaca", "sharegpt", "OpenAI"]:
        assert part in str(error.value)
    with pytest.raises(BrokenRecord) as later:
        conversation_of(record)
    assert later.value.reason == chat.UNKNOWN_FORMAT


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("record", [{"messages": None}, {"prompt": "p", "completion": None}])
def test_a_known_format_that_holds_null_is_a_broken_record(record, first):
    with pytest.raises(BrokenRecord, match="holds null") as error:
        normalise(RawRecord(record, "data.jsonl", 1, "line", first=first))
    assert error.value.reason == fields.MISSING_FIELD


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ({"parameters": {"x": 1}}, {"x": 1}),
        ({"arguments": '{"x": 1}', "parameters": {"y": 1}}, {"x": 1}),
        ({"arguments": ""}, {}),
        ({"arguments": None}, {}),
        ({}, {}),
    ],
)
def test_arguments_of_a_tool_call(given, arguments):
    call = {"name": "f", **given}
    written = {"role": "function_call", "content": json.dumps(call)}
    for message in (written, {"role": "assistant", "tool_calls": [{"function": call}]}):
        (turn,) = conversation_of({"messages": [message]}).messages
        assert turn["tool_calls"][0]["function"] == {"name": "f", "arguments": arguments}


def test_an_answer_that_is_context_only_may_be_empty():
    empty = {"role": "assistant", "content": "", "weight": 0}
    assert len(conversation_of({"messages": [empty, ANSWER]}).messages) == 2
    with pytest.raises(BrokenRecord):
        conversation_of({"messages": [{**empty, "weight": 1}, ANSWER]})


BROKEN_MESSAGES = [
    ([{**ANSWER, "tool_calls": [{"name": "f", "input": {"x": 1}}]}], fields.MISSING_FIELD),
    ([{**ANSWER, "tool_calls": [{"name": "f", "arguments": []}]}], fields.WRONG_TYPE),
    ([{**ANSWER, "thinking": 3}], fields.WRONG_TYPE),
    ("text", fields.WRONG_TYPE),
    ([1], fields.WRONG_TYPE),
    ([{"role": "assistant", "content": 3}], fields.WRONG_TYPE),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], fields.WRONG_TYPE),
    ([{**ANSWER, "tool_calls": "not json"}], fields.WRONG_TYPE),
    ([{**ANSWER, "tool_calls": [{"name": "f", "arguments": "not json"}]}], fields.WRONG_TYPE),
    ([{**ANSWER, "tool_calls": [{"name": "f", "arguments": "[1]"}]}], fields.WRONG_TYPE),
    ([{**ANSWER, "tool_calls": [{"arguments": {}}]}], fields.MISSING_FIELD),
    ([{**ANSWER, "reasoning_content": 1}], fields.WRONG_TYPE),
    ([{"from": "function_call", "value": "add(1)"}], fields.WRONG_TYPE),
    ([{"role": "assistant"}], fields.MISSING_FIELD),
    ([{"content": "a"}], fields.MISSING_FIELD),
    ([{"role": "critic", "content": "a"}, ANSWER], messages.UNKNOWN_ROLE),
    ([{"role": ["user"], "content": "a"}, ANSWER], messages.UNKNOWN_ROLE),
    ([{"role": "assistant", "content": " \n"}], chat.EMPTY_ASSISTANT),
    ([ANSWER, {"role": "assistant", "content": ""}], chat.EMPTY_ASSISTANT),
    ([], chat.NO_ASSISTANT),
    ([{"role": "user", "content": "q"}], chat.NO_ASSISTANT),
    ([{"role": "user", "content": "half \ud83d"}, ANSWER], chat.NOT_ENCODABLE),
    ([{**ANSWER, "tool_calls": [{"name": "f", "arguments": {"\udc00": 1}}]}], chat.NOT_ENCODABLE),
    ([{**ANSWER, "weight": 0.5}], masks.WEIGHTED),
]
BROKEN_ALPACA = [
    ({"instruction": "q"}, fields.MISSING_FIELD),
    ({"output": "a"}, fields.MISSING_FIELD),
    ({"instruction": "q", "output": ["better", "worse"]}, fields.WRONG_TYPE),
    ({"instruction": "q", "output": "a", "input": 1}, fields.WRONG_TYPE),
    ({"instruction": "q", "output": "a", "history": [["q"]]}, fields.WRONG_TYPE),
    ({"instruction": "q", "output": "a", "system": 1}, fields.WRONG_TYPE),
    ({"instruction": "q", "output": "a", "tools": "nonsense"}, fields.WRONG_TYPE),
    ({"instruction": "q", "output": "a", "tools": [1]}, fields.WRONG_TYPE),
    ({"instruction": "q", "output": ""}, chat.EMPTY_ASSISTANT),
]


@pytest.mark.parametrize(
    ("record", "reason"),
    [({"messages": messages}, reason) for messages, reason in BROKEN_MESSAGES] + BROKEN_ALPACA,
)
def test_broken_records_have_a_reason(record, reason):
    with pytest.raises(BrokenRecord) as error:
        conversation_of(record)
    assert error.value.reason == reason
    assert error.value.detail.isprintable()


PICTURED = {"role": "user", "content": "<image>\nWho is it?"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [ANSWER, QUESTION], "chosen": ANSWER, "rejected": ANSWER}, chat.PREFERENCES),
        ({"messages": [QUESTION], "chosen": [ANSWER], "rejected": [ANSWER]}, chat.PREFERENCES),
        ({"messages": [PICTURED, ANSWER], "images": ["a.jpg"]}, chat.NOT_TEXT),
        ({"instruction": "<audio>", "output": "a", "audio": {"path": "a.wav"}}, chat.NOT_TEXT),
    ],
)
def test_a_record_of_which_a_part_stands_elsewhere_is_left_out(record, reason):
    with pytest.raises(BrokenRecord) as error:
        conversation_of(record)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("turns", "others"),
    [
        ([QUESTION, ANSWER], {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION]}),
        ([PICTURED, ANSWER], {}),
        ([PICTURED, ANSWER], {"images": []}),
        ([PICTURED, ANSWER], {"videos": ["a.mp4"]}),
        ([QUESTION, ANSWER], {"image": "a.jpg"}),
    ],
)
def test_other_pictures_and_preferences_count_as_unread(turns, others):
    assert conversation_of({"messages": turns, **others}).unread == set(others)


@pytest.mark.parametrize(
    ("record", "unread"),
    [
        ({"messages": [ANSWER], "id": 3, "empty": None}, {"id"}),
        ({"messages": [{**ANSWER, "stamp": 1, "empty": None}]}, {"messages.stamp"}),
        ({"messages": [{**ANSWER, "reasoning": "r", "weight": 1}], "tools": [TOOL]}, set()),
        ({"messages": [{**ANSWER, "name": "n"}]}, {"messages.name"}),
        (
            {"messages": [{"role": "user", "content": "q", "name": "n", "thinking": "t"}, ANSWER]},
            {"messages.thinking"},
        ),
        (
            {"system": "s", "messages": [{"role": "system", "content": "t"}, ANSWER]},
            {"system"},
        ),
        ({"conversations": [{"from": "gpt", "value": "a"}], "output": "o"}, {"output"}),
        ({"instruction": "i", "output": "o", "history": [], "text": "t"}, {"text"}),
        ({"prompt": "p", "completion": "c", "system": "s", "source": "x"}, {"source"}),
        (
            {"prompt": [{"role": "user", "content": "q", "x": 1}], "completion": [ANSWER]},
            {"messages.x"},
        ),
    ],
)
def test_fields_that_nothing_reads_are_named(record, unread):
    assert conversation_of(record).unread == unread


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "q", "context": "", "response": "a"},
        {"instruction": None, "context": "c", "response": "a"},
        {"input": "q", "output": "a"},
        {"prompt": "q", "output": "a"},
    ],
)
def test_a_first_record_with_one_of_alpacas_columns_is_of_no_known_format(record):
    with pytest.raises(DataError, match="--data-columns prompt=") as error:
        normalise(RawRecord(record, "data.jsonl", 1, "line", first=True))
    for part in ["data.jsonl, line 1", "the format is not known", *record]:
        assert part in str(error.value)
    given = {"instruction": "q", "output": None}
    with pytest.raises(BrokenRecord):
        normalise(RawRecord(given, "data.jsonl", 1, "line", first=True))
