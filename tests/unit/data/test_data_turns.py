"""What the assistant says before the tools answer is one turn, however a record writes it."""

import json
from datetime import datetime
from decimal import Decimal

import pytest

from megatron_profit.data import BrokenRecord, RawRecord, normalise
from megatron_profit.data.chat import conversations as chat
from megatron_profit.data.chat import messages, thoughts
from megatron_profit.data.files import fields

QUESTION = {"role": "user", "content": "Weather?"}
RESULT = {"role": "tool", "content": "3"}
THOUGHT = "<think>\nI need the tool.\n</think>\n\n"


def call(city, as_text=False):
    arguments = {"city": city}
    return {
        "name": "weather",
        "arguments": json.dumps(arguments) if as_text else arguments,
    }


def calling(*cities):
    return [{"type": "function", "function": call(city)} for city in cities]


def answer(content="", **more):
    return {"role": "assistant", "content": content, **more}


def said(*turns, key="messages", **record):
    """The assistant's messages."""
    record = {key: [QUESTION, *turns], **record}
    return normalise(RawRecord(record, "data.jsonl", 1, "line")).assistant_messages


OSLO = {"role": "tool_call", "content": json.dumps(call("Oslo"))}
ROME = {"role": "function_call", "content": json.dumps(call("Rome"))}


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([OSLO, ROME], answer(tool_calls=calling("Oslo", "Rome"))),
        ([OSLO, OSLO, ROME], answer(tool_calls=calling("Oslo", "Oslo", "Rome"))),
        (
            [answer(tool_calls=calling("Oslo")), answer(tool_calls=calling("Rome"))],
            answer(tool_calls=calling("Oslo", "Rome")),
        ),
        ([answer("Let me look."), OSLO], answer("Let me look.", tool_calls=calling("Oslo"))),
        ([answer(THOUGHT), OSLO], answer(THOUGHT, tool_calls=calling("Oslo"))),
        ([answer(THOUGHT), answer("3.")], answer(THOUGHT + "3.")),
        (
            [answer(reasoning_content="Hm."), OSLO],
            answer(reasoning_content="Hm.", tool_calls=calling("Oslo")),
        ),
        ([answer(reasoning_content="Hm."), answer("3.")], answer("3.", reasoning_content="Hm.")),
        (
            [{**OSLO, "reasoning": "Hm."}],
            answer(reasoning_content="Hm.", tool_calls=calling("Oslo")),
        ),
        (
            [{**OSLO, "content": THOUGHT + OSLO["content"]}],
            answer(THOUGHT, tool_calls=calling("Oslo")),
        ),
        ([answer(), OSLO], answer(tool_calls=calling("Oslo"))),
        (
            [{"role": "assistant", "tool_calls": calling("Oslo"), "content": None}, ROME],
            answer(tool_calls=calling("Oslo", "Rome")),
        ),
    ],
)
def test_parts_of_a_turn_are_joined(turns, expected):
    assert said(*turns, RESULT, answer("Done.")) == [expected, answer("Done.")]


def test_parts_of_a_turn_are_joined_in_every_format():
    parts = [
        {"from": "gpt", "value": "Let me look."},
        {"from": "function_call", "value": OSLO["content"]},
    ]
    expected = answer("Let me look.", tool_calls=calling("Oslo"))
    assert said({"from": "human", "value": "q"}, *parts, key="conversations") == [expected]
    record = {"prompt": [QUESTION], "completion": [answer("Let me look."), OSLO]}
    conversation = normalise(RawRecord(record, "data.jsonl", 1, "line"))
    assert conversation.assistant_messages == [expected]


@pytest.mark.parametrize(
    "turns",
    [
        [answer("One."), answer("Two.")],
        [answer("One."), answer("Two.", tool_calls=calling("Oslo"))],
        [OSLO, answer("It is warm.")],
        [OSLO, RESULT, ROME],
        [OSLO, QUESTION, ROME],
    ],
)
def test_messages_of_their_own_stay_so(turns):
    assert len(said(*turns)) == 2


@pytest.mark.parametrize("content", [THOUGHT, "</think>", "why\n</think>\n", "<think></think> \n"])
def test_an_answer_of_thoughts_alone_is_empty(content):
    with pytest.raises(BrokenRecord) as error:
        said(answer("a"), QUESTION, answer(content))
    assert error.value.reason == chat.EMPTY_ASSISTANT


def test_reasoning_that_holds_the_tag_which_ends_it_is_left_out():
    with pytest.raises(BrokenRecord) as error:
        said(answer("a", reasoning_content="The tag </think> ends it."))
    assert error.value.reason == chat.THOUGHTS_END_INSIDE


@pytest.mark.parametrize(
    "block", [THOUGHT, "<think>I need the tool.</think>\n", "<think>\n\n</think>"]
)
def test_thoughts_in_two_places_are_trained_once(block):
    given = answer(f"{block}3.", reasoning_content="I need the tool.")
    assert said(given) == [answer("3.", reasoning_content="I need the tool.")]
    with pytest.raises(BrokenRecord) as error:
        said({**given, "content": "<think>Other thoughts.</think>3."})
    assert error.value.reason == messages.TWO_THOUGHTS


def test_thoughts_that_are_cut_off_are_no_answer():
    cut = answer("<think>\nI need")
    for turn in (cut, {**cut, "tool_calls": calling("Oslo")}):
        with pytest.raises(BrokenRecord) as error:
            said(answer("a"), QUESTION, turn)
        assert error.value.reason == chat.THOUGHTS_NEVER_END
    assert said({**cut, "weight": 0}, QUESTION, answer("a")) == [cut, answer("a")]
    assert said(answer("The tag <think> begins it.")) == [answer("The tag <think> begins it.")]


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("content", [None, "", "I look."])
def test_the_older_form_of_a_call(content, as_text):
    function = call("Oslo", as_text)
    expected = answer(content or "", tool_calls=calling("Oslo"))
    assert said(answer(content, function_call=function)) == [expected]
    assert said(answer(content, function_call=json.dumps(function))) == [expected]
    assert said(answer(content, function_call=function, tool_calls=[])) == [expected]
    for nothing in (None, "", "null", {}):
        assert said(answer("a", function_call=nothing)) == [answer("a")]


def test_functions_are_tools():
    tool = {"name": "weather", "parameters": {"type": "object"}}
    record = {"messages": [QUESTION, answer("a")], "functions": [tool]}
    conversation = normalise(RawRecord(record, "data.jsonl", 1, "line"))
    assert conversation.tools == [{"type": "function", "function": tool}]
    assert conversation.unread == frozenset()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"messages": [answer("a", function_call=call("a"), tool_calls=calling("b"))]},
            messages.TWO_CALLS,
        ),
        (
            {"messages": [answer("a")], "tools": [{"name": "f"}], "functions": [{"name": "g"}]},
            chat.TWO_LISTS,
        ),
    ],
)
def test_two_fields_of_one_meaning_contradict_each_other(record, reason):
    with pytest.raises(BrokenRecord) as error:
        normalise(RawRecord(record, "data.jsonl", 1, "line"))
    assert error.value.reason == reason


def as_text(value):
    return json.dumps(value)


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": as_text([QUESTION, answer("a")])},
        {"messages": [as_text(QUESTION), as_text(answer("a"))]},
        {"conversations": as_text([{"from": "human", "value": "Weather?"}, answer("a")])},
        {"prompt": as_text([QUESTION]), "completion": as_text([answer("a")])},
        {"messages": [QUESTION, answer("a", tool_calls="[]")]},
        {"messages": [QUESTION, answer("a", tool_calls="null")]},
        {"messages": [QUESTION, answer("a", tool_calls=" ")]},
        {"messages": [QUESTION, answer("a", tool_calls={})]},
        {"messages": [QUESTION, answer("a")], "tools": "null"},
        {"messages": [QUESTION, answer("a")], "tools": ""},
    ],
)
def test_lists_may_be_json_text(record):
    conversation = normalise(RawRecord(record, "data.jsonl", 1, "line"))
    assert conversation.messages == [QUESTION, answer("a")]
    assert conversation.tools is None


@pytest.mark.parametrize(
    "calls",
    [
        as_text(calling("Oslo")),
        [as_text(calling("Oslo")[0])],
        as_text(call("Oslo")),
        [{"function": as_text(call("Oslo"))}],
        {"name": "weather", "arguments": as_text({"city": "Oslo"})},
        as_text({"name": "weather", "arguments": None, "parameters": {"city": "Oslo"}}),
    ],
)
def test_calls_may_be_json_text(calls):
    assert said({"role": "assistant", "tool_calls": calls}) == [answer(tool_calls=calling("Oslo"))]


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        as_text([TOOL]),
        [as_text(TOOL)],
        TOOL,
        as_text(TOOL),
        TOOL["function"],
        {"function": TOOL["function"]},
        [{**TOOL, "function": as_text(TOOL["function"])}],
        [{**TOOL, "function": {"name": "weather", "parameters": '{"type": "object"}'}}],
        [{"name": "weather", "parameters": '{"type": "object"}'}],
    ],
)
def test_tools_may_be_json_text_or_one_tool(tools):
    record = {"messages": [QUESTION, answer("a")], "tools": tools}
    assert normalise(RawRecord(record, "data.jsonl", 1, "line")).tools == [TOOL]


@pytest.mark.parametrize(
    "tools", [[1], ["f"], {"weather": {"parameters": {}}}, [{"type": "function", "function": []}]]
)
def test_what_is_no_tool_leaves_the_record_out(tools):
    with pytest.raises(BrokenRecord):
        said(answer("a"), tools=tools)


def test_tools_of_another_kind_stay_as_they_are():
    record = {"messages": [QUESTION, answer("a")], "tools": [{"type": "code_interpreter"}]}
    assert normalise(RawRecord(record, "data.jsonl", 1, "line")).tools == record["tools"]


@pytest.mark.parametrize("history", [[["q", "a"]], '[["q", "a"]]', ['["q", "a"]']])
def test_a_history_may_be_json_text(history):
    record = {"instruction": "r", "output": "b", "history": history}
    turns = normalise(RawRecord(record, "data.jsonl", 1, "line")).messages
    assert [turn["content"] for turn in turns] == ["q", "a", "r", "b"]


def test_a_prompt_that_begins_with_a_bracket_is_a_text():
    for prompt, completion in (("[1, 2]", "[3]"), ("[1", "2"), ("[]", "[]"), ('[{"a": 1}]', "[1]")):
        record = {"prompt": prompt, "completion": completion}
        turns = normalise(RawRecord(record, "data.jsonl", 1, "line")).messages
        assert [turn["content"] for turn in turns] == [prompt, completion]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"x": float("nan")}, fields.NOT_FINITE),
        ({"x": [{"y": float("-inf")}]}, fields.NOT_FINITE),
        ('{"x": NaN}', fields.NOT_FINITE),
        ('{"x": 1e400}', fields.NOT_FINITE),
        ('{"x": 1, "x": 2}', fields.NAMED_TWICE),
        ('{"x": {"y": 1, "y": 1}}', fields.NAMED_TWICE),
        ("{'x': 1}", fields.WRONG_TYPE),
        ("[" * 100_000, fields.WRONG_TYPE),
        ('{"x": ' + "9" * 5_000 + "}", fields.WRONG_TYPE),
    ],
)
def test_arguments_that_are_no_json_leave_the_record_out(arguments, reason):
    function = {"name": "f", "arguments": arguments}
    for field in ({"tool_calls": [function]}, {"function_call": function}):
        with pytest.raises(BrokenRecord) as error:
            said({"role": "assistant", **field})
        assert error.value.reason == reason
        assert len(error.value.detail) < 500


def test_tools_that_are_no_json_leave_the_record_out():
    for tools in ([{"name": "f", "default": float("inf")}], '[{"name": "f", "name": "g"}]'):
        with pytest.raises(BrokenRecord):
            said(answer("a"), tools=tools)


def test_numbers_that_nothing_reads_may_be_anything():
    assert said(answer("a"), score=float("nan")) == [answer("a")]


def test_null_fields_of_calls_and_tools_are_left_out_and_told():
    tool = {"name": "f", "parameters": {"a": {"type": "x", "enum": ["b", None]}, "c": None}}

    def read(arguments, tools):
        calls = [{"name": "f", "arguments": arguments, "id": None}]
        record = {"messages": [QUESTION, answer(tool_calls=calls)], "tools": tools}
        conversation = normalise(RawRecord(record, "data.jsonl", 1, "line"))
        (call,) = conversation.messages[1]["tool_calls"]
        return call["function"]["arguments"], conversation.tools, conversation.nulls

    sparse = {"name": "f", "parameters": {"a": {"type": "x", "enum": ["b", None]}}}
    given = {"x": 1, "y": None, "z": {"u": None, "v": [None]}}
    whole = [{"type": "function", "function": sparse}]
    assert read(given, [tool]) == ({"x": 1, "z": {"v": [None]}}, whole, True)
    assert read({"x": 1}, [sparse]) == ({"x": 1}, whole, False)
    assert read({"x": None}, None) == ({}, None, True)
    # Nothing adds nulls to JSON text.
    kept = [{"type": "function", "function": tool}]
    assert read(json.dumps(given), json.dumps([tool])) == (given, kept, False)


def completed(prompt, completion):
    record = {"prompt": prompt, "completion": completion}
    return normalise(RawRecord(record, "data.jsonl", 1, "line"))


@pytest.mark.parametrize("form", [list, as_text])
def test_a_prompt_of_messages_may_have_a_text_as_its_completion(form):
    conversation = completed(form([QUESTION]), "a")
    assert conversation.messages == [QUESTION, answer("a")]
    assert conversation.untrained == {0}
    with pytest.raises(BrokenRecord, match="write the whole answer"):
        completed(form([QUESTION, answer("It is")]), "2")


@pytest.mark.parametrize("form", [list, as_text])
def test_each_message_next_to_a_text_may_be_json_text(form):
    assert completed(form([as_text(QUESTION)]), "a").messages == [QUESTION, answer("a")]
    assert completed("Weather?", [as_text(answer("a"))]).messages == [QUESTION, answer("a")]
    with pytest.raises(BrokenRecord, match="'content' stands twice"):
        completed(form(['{"role": "user", "content": "q", "content": "r"}']), "a")


def test_several_texts_are_no_prompt_and_no_answer():
    for pair in ((["q", "r"], "a"), ("q", ["a", "b"])):
        with pytest.raises(BrokenRecord, match="neither a text nor a list of messages"):
            completed(*pair)
    assert completed(["Weather?"], "a").messages == [QUESTION, answer("a")]
    assert completed("{q}", ["{a}"]).messages[1] == answer("{a}")


def test_a_prompt_that_is_a_text_may_have_messages_as_its_completion():
    assert completed("Weather?", [answer("a")]).messages == [QUESTION, answer("a")]
    with pytest.raises(BrokenRecord) as error:
        completed("Weather?", as_text([answer("a")]))
    assert error.value.reason == chat.TEXT_OR_MESSAGES


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('[{"role": "user", "content": "q", "content": "r"}]', fields.NAMED_TWICE),
        ('[{"content": "q", "role": "assistant", "role": "user"}]', fields.NAMED_TWICE),
        ('[{"from": "human", "value": "q', fields.WRONG_TYPE),
        ('[{"role": "user", "content": "q"}, {"content": "r"}]', None),
        ("[{'content': 'What is [x]?', 'role': 'user'}]", fields.WRONG_TYPE),
    ],
)
def test_messages_that_cannot_be_read_are_no_text_of_their_own(broken, reason, place):
    pair = [as_text([QUESTION]), as_text([answer("a")])]
    pair[place] = broken
    with pytest.raises(BrokenRecord) as error:
        completed(*pair)
    assert reason in (None, error.value.reason)


@pytest.mark.parametrize(
    "prompt",
    [
        '[{"from": "Rome", "to": "Oslo"}]',
        '[{"name": "Ann", "role": "cook"}]\nWho cooks?',
        "[{'name': 'Ann', 'role': 'developer'}]",
    ],
)
def test_json_that_names_no_role_of_a_message_is_a_text(prompt):
    texts = [message["content"] for message in completed(prompt, "a").messages]
    assert texts == [prompt, "a"]


@pytest.mark.parametrize(
    "content", ["R\n</think>\n\n4", "R</think>4", "</think>\n4", "<think>R</think>4"]
)
def test_thoughts_with_the_closing_tag_alone_are_trained_once(content):
    assert said(answer(content, reasoning_content="R\n")) == [answer("4", reasoning_content="R\n")]


def test_other_thoughts_with_the_closing_tag_alone_leave_the_record_out():
    with pytest.raises(BrokenRecord) as error:
        said(answer("Other.\n</think>\n\n4", reasoning_content="R"))
    assert error.value.reason == messages.TWO_THOUGHTS
    for content in ("R", "Use `text.split('</think>')[1]`."):
        assert said(answer(content, reasoning_content="R"))[0]["content"] == content


def test_a_closing_tag_in_a_block_of_code_is_a_mention():
    content = "End with this line:\n```\n</think>\n```\nThen answer."
    assert thoughts.split(content) == ("", content)
    assert said(answer(content, reasoning_content="R"))[0]["content"] == content
    after = "```\nx\n```\nSo.\n</think>\n4"
    assert thoughts.split(after) == ("```\nx\n```\nSo.\n", "\n4")


@pytest.mark.parametrize(
    "field", ["function_calls", "tool_call", "toolCalls", "functionCall", "Tool_Calls"]
)
def test_calls_in_a_field_that_is_not_read_leave_the_record_out(field):
    for calls in (calling("Oslo"), as_text(calling("Oslo")), "weather(city='Oslo')", call("Oslo")):
        with pytest.raises(BrokenRecord) as error:
            said(answer("Let me look.", **{field: calls}))
        assert error.value.reason == messages.OTHER_CALLS
        assert field in error.value.detail
    for none in (None, "", "[]", [], {}, "null"):
        assert said(answer("a", **{field: none})) == [answer("a")]


def system(**more):
    return {"role": "system", "content": "s", **more}


def read_tools_of(*turns, **record):
    turns = [*turns, QUESTION, answer("a")]
    return normalise(RawRecord({"messages": turns, **record}, "data.jsonl", 1, "line"))


@pytest.mark.parametrize("name", ["tools", "functions"])
@pytest.mark.parametrize("form", [list, as_text])
def test_tools_in_the_leading_system_message_are_the_records(name, form):
    conversation = read_tools_of(system(**{name: form([TOOL])}))
    assert (conversation.tools, conversation.unread) == ([TOOL], frozenset())
    assert conversation.messages[0] == system()
    assert read_tools_of(system(**{name: form([TOOL])}), tools=[TOOL]).tools == [TOOL]
    assert read_tools_of(system(**{name: form([])})).tools is None


def test_tools_in_two_places_leave_the_record_out():
    with pytest.raises(BrokenRecord) as error:
        read_tools_of(system(tools=[TOOL]), tools=[{"name": "other"}])
    assert error.value.reason == chat.TWO_LISTS
    with pytest.raises(BrokenRecord) as error:
        read_tools_of(QUESTION, answer("b"), system(functions=[TOOL]))
    assert error.value.reason == chat.LATER_TOOLS


FUNCTION = {"name": "weather", "arguments": {"city": "Oslo"}}


@pytest.mark.parametrize(
    "turn",
    [
        answer(tool_calls=[{"function": None, **FUNCTION}]),
        answer(tool_calls=[{"function": {**FUNCTION, "parameters": None}, "name": None}]),
        answer(
            tool_calls=[{"function": FUNCTION}], function_call={"name": None, "arguments": None}
        ),
        answer(tool_calls={"name": None, "function": None}, function_call=FUNCTION),
    ],
)
def test_null_fields_around_the_arguments_of_a_call_are_absent(turn):
    record = {"messages": [QUESTION, turn]}
    conversation = normalise(RawRecord(record, "data.jsonl", 1, "line"))
    assert conversation.assistant_messages == [answer(tool_calls=calling("Oslo"))]
    assert not conversation.nulls


def test_null_fields_around_a_tool_are_absent():
    flat = {"type": "function", "function": None, **TOOL["function"]}
    assert read_tools_of(tools=[flat]).tools == [TOOL]
    assert read_tools_of(tools={"type": None, "function": None}).tools is None
    assert read_tools_of(tools=[flat], functions={"name": None}).tools == [TOOL]


@pytest.mark.parametrize("content", [{"content": None}, {}])
def test_a_message_of_reasoning_needs_no_content(content):
    hm = {"role": "assistant", "reasoning_content": "Hm.", **content}
    assert said(hm, answer("3.")) == [answer("3.", reasoning_content="Hm.")]
    with pytest.raises(BrokenRecord) as error:
        said(hm)
    assert error.value.reason == chat.EMPTY_ASSISTANT


@pytest.mark.parametrize("value", [datetime(2024, 5, 1), Decimal("1.5"), b"x"])
def test_values_that_json_does_not_have_leave_the_record_out(value):
    function = {"name": "f", "arguments": {"days": [{"date": value}]}}
    with pytest.raises(BrokenRecord) as error:
        said(answer(tool_calls=[{"function": function}]))
    assert error.value.reason == fields.NO_JSON_TYPE
    assert "0.function.arguments.days.0.date is the" in error.value.detail
    assert "as JSON text" in error.value.detail
    tool = {"name": "f", "parameters": {"default": value}}
    with pytest.raises(BrokenRecord, match=r"0\.function\.parameters\.default is the"):
        said(answer("a"), tools=[tool])


def test_parts_of_a_completion_have_their_weight():
    parts = [{"type": "text", "text": "a", "weight": 0}]
    conversation = completed("Weather?", parts)
    assert conversation.messages == [QUESTION, answer("a")]
    assert conversation.untrained == {1}
