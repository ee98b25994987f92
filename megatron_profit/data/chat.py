"""Turns raw records of the common chat formats into the messages that chat templates take.

A record that cannot be used raises `BrokenRecord` with a reason from a fixed list, so that preparation can go
on and count. Where the first record of a file is in a format that is not known, the file is refused.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_profit.data.errors import BrokenRecord, DataError, shown
from megatron_profit.data.records import RawRecord
from megatron_profit.data.sources import Layout

WRONG_TYPE = "a field has the wrong type"
MISSING_FIELD = "a field is missing"
UNKNOWN_ROLE = "a role is not known"
EMPTY_ASSISTANT = "an assistant turn is empty"
NO_ASSISTANT = "there is no assistant turn"
NOT_ENCODABLE = "a text cannot be encoded as UTF-8"
WEIGHTED = "a message has a weight other than 0 or 1"
UNKNOWN_FORMAT = "the format is not known"

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
}
# Roles whose text is the JSON of one tool call or of several.
CALL_ROLES = ("function_call", "tool_call")
# Names that a message's reasoning goes by; the first that says anything counts.
REASONING = ("reasoning_content", "reasoning", "thinking")
# And the arguments of a call; Llama 3's templates write the latter.
_ARGUMENTS = ("arguments", "parameters")
# What is read of a record in each format, and of a message.
_RECORD_FIELDS = {
    "messages": frozenset({"messages", "system", "tools"}),
    "conversations": frozenset({"conversations", "system", "tools"}),
    "alpaca": frozenset({"instruction", "input", "output", "history", "system", "tools"}),
    "completion": frozenset({"prompt", "completion", "system", "tools"}),
}
_EVERY_MESSAGE = frozenset({"role", "from", "content", "value", "weight"})
_ASSISTANT_MESSAGE = _EVERY_MESSAGE | {"tool_calls", *REASONING}
_OTHER_MESSAGE = _EVERY_MESSAGE | {"name", "tool_call_id"}

FORMATS = (
    "alpaca (instruction, input, output; optional system, history, tools)",
    "sharegpt (conversations: a list of from, value; optional system, tools)",
    "OpenAI (messages: a list of role, content; optional tools)",
    "prompt and completion",
)

Message = dict[str, Any]


def read_fields(layout: Layout) -> frozenset[str]:
    """Names of the fields of a record that `normalise` reads."""
    named = frozenset(layout.columns.values())
    return named or frozenset().union(*_RECORD_FIELDS.values())


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template takes.

    Attributes:
        messages: Each has `role` (system, user, assistant or tool) and `content` (str), and where
            the record has them `reasoning_content`, `tool_calls`, `tool_call_id` and `name`.
        tools: JSON schemas of the tools offered to the model, None without any.
        untrained: Positions of the messages that the record gives the weight 0: context only.
        unread: Fields of the record that hold something and that nothing reads; those of its messages as
            "messages.NAME".
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    untrained: frozenset[int] = frozenset()
    unread: frozenset[str] = frozenset()

    @property
    def assistant_messages(self) -> list[Message]:
        return [message for message in self.messages if message["role"] == "assistant"]

    @property
    def trained(self) -> list[bool]:
        """For each assistant message whether the record wants it trained."""
        turns = enumerate(self.messages)
        return [i not in self.untrained for i, turn in turns if turn["role"] == "assistant"]


def normalise(record: RawRecord, layout: Layout | None = None) -> Conversation:
    """The conversation that a raw record holds, whichever known format it is in.

    Without a layout the keys tell the format: `messages`, `conversations`, `instruction` or `output`, or
    else `prompt` and `completion`. Entries may name their fields role and content or from and value in
    either of the first two.

    Raises:
        DataError: The first record of its file has none of these keys.
        BrokenRecord: A later one has none of them, or the record cannot be used.
    """
    if record.broken:
        raise record.broken
    layout = layout or Layout()
    renamed = layout.renamed(record.value)
    value = {key: item for key, item in renamed.items() if item is not None}
    kind = _format(value)
    if kind is None:
        raise _unknown_format(record, empty=_format(renamed) is not None)
    messages = _READERS[kind](value)
    unread = value.keys() - _RECORD_FIELDS[kind] | layout.unnamed(record.value)
    unread |= {f"messages.{name}" for turn in messages for name in turn.pop("unread", ())}
    if value.get("system") and messages and messages[0]["role"] == "system":
        unread.add("system")
    messages = _with_system(value, messages)
    untrained = frozenset(i for i, turn in enumerate(messages) if turn.pop("weight", 1) == 0)
    tools = _tools(value.get("tools"))
    conversation = Conversation(messages, tools, untrained, frozenset(unread))
    _check(conversation)
    return conversation


def _format(value: dict[str, Any]) -> str | None:
    """The format that the keys tell."""
    for kind in ("messages", "conversations"):
        if kind in value:
            return kind
    if "instruction" in value or "output" in value:
        return "alpaca"
    return "completion" if "prompt" in value and "completion" in value else None


def _unknown_format(record: RawRecord, *, empty: bool) -> Exception:
    found = f"found the keys {shown(list(record.value))}"
    if empty:
        return BrokenRecord(MISSING_FIELD, f"{found}, of which one that is needed holds null")
    if not record.first:
        return BrokenRecord(UNKNOWN_FORMAT, found)
    return DataError(
        f"{record.where}: the format is not known, {found}; known are {'; '.join(FORMATS)}. Rename "
        "the fields to one of these, or name the columns with --data-columns"
    )


def strings(value: object) -> Iterator[str]:
    """Every string inside lists and dicts, keys included (no recursion: data may nest deeply)."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)


def _alpaca_messages(value: dict[str, Any]) -> list[Message]:
    messages: list[Message] = []
    for pair in _typed(value, "history", list, default=[]):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise BrokenRecord(WRONG_TYPE, f"history holds {shown(pair)}, not a pair of texts")
        messages += _exchange(_text(pair[0]), _text(pair[1]))
    parts = (_typed(value, "instruction", str), _typed(value, "input", str, default=""))
    query = "\n".join(part for part in parts if part)
    return messages + _exchange(query, _typed(value, "output", str))


def _completed(prompt: Any, completion: Any) -> list[Message]:
    """Two texts, or two lists of messages, of which the first is context only."""
    if isinstance(prompt, list) and isinstance(completion, list):
        return [{**turn, "weight": 0} for turn in _messages(prompt)] + _messages(completion)
    return _exchange(_text(prompt), _text(completion))


def _exchange(query: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]


def _messages(entries: Any) -> list[Message]:
    if not isinstance(entries, list):
        raise BrokenRecord(WRONG_TYPE, f"the list of messages is {shown(entries)}")
    return [_message(entry) for entry in entries]


def _message(entry: Any) -> Message:
    if not isinstance(entry, dict):
        raise BrokenRecord(WRONG_TYPE, f"a message is {shown(entry)}, not an object")
    entry = {key: item for key, item in entry.items() if item is not None}
    weight = {"weight": entry["weight"]} if "weight" in entry else {}
    if weight and entry["weight"] not in (0, 1):
        raise BrokenRecord(WEIGHTED, f"weight is {shown(entry['weight'])}")
    name = _either(entry, "role", "from")
    if not isinstance(name, str) or name not in ROLES:
        raise BrokenRecord(UNKNOWN_ROLE, f"{shown(name)}; known are {', '.join(ROLES)}")
    role = ROLES[name]
    if name in CALL_ROLES:
        known = _EVERY_MESSAGE
        calls = _tool_calls(_parsed(_either(entry, "content", "value")))
        fields: Message = {"content": "", "tool_calls": calls}
    elif role == "assistant":
        known, fields = _ASSISTANT_MESSAGE, _assistant_fields(entry)
    else:
        known, fields = _OTHER_MESSAGE, _fields(entry)
    others = entry.keys() - known
    unread = {"unread": others} if others else {}
    return {"role": role, **fields, **weight, **unread}


def _fields(entry: dict[str, Any]) -> Message:
    present = [key for key in ("name", "tool_call_id") if key in entry]
    identifiers: Message = {key: _typed(entry, key, str) for key in present}
    return {"content": _text(_either(entry, "content", "value")), **identifiers}


def _assistant_fields(entry: dict[str, Any]) -> Message:
    fields: Message = {}
    if entry.get("tool_calls"):
        fields["tool_calls"] = _tool_calls(entry["tool_calls"])
    # A template tells "no reasoning field" from an empty one: only the former lets it find <think>
    # in the content.
    given = (_typed(entry, name, str, default="") for name in REASONING)
    if reasoning := next(filter(None, given), None):
        fields["reasoning_content"] = reasoning
    has_content = "content" in entry or "value" in entry or "tool_calls" not in fields
    return {"content": _text(_either(entry, "content", "value")) if has_content else "", **fields}


_READERS: dict[str, Callable[[dict[str, Any]], list[Message]]] = {
    "messages": lambda value: _messages(value["messages"]),
    "conversations": lambda value: _messages(value["conversations"]),
    "alpaca": _alpaca_messages,
    "completion": lambda value: _completed(value["prompt"], value["completion"]),
}


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        calls = [calls]
    return [_tool_call(call) for call in calls]


def _tool_call(call: Any) -> dict[str, Any]:
    """One call as {"type", "function": {"name", "arguments"}}, arguments read from JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise BrokenRecord(WRONG_TYPE, f"a tool call is {shown(call)}, not an object")
    arguments = _arguments(function)
    identifier = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    name = _typed(function, "name", str)
    return {**identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(function: dict[str, Any]) -> dict[str, Any]:
    """What a function is called with; a call that names nothing but the function takes nothing."""
    given = next((function[name] for name in _ARGUMENTS if name in function), None)
    if given is None and (others := function.keys() - {*_ARGUMENTS, "name", "id", "type", "index"}):
        raise BrokenRecord(
            MISSING_FIELD, f"a tool call has {shown(sorted(others))} and no arguments"
        )
    arguments = {} if given is None or given == "" else _parsed(given)
    if not isinstance(arguments, dict):
        raise BrokenRecord(WRONG_TYPE, f"the arguments of a tool call are {shown(arguments)}")
    return arguments


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    tools = _parsed(tools) if tools else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BrokenRecord(WRONG_TYPE, f"tools is {shown(tools)}, not a list of objects")
    # Some data sets leave the outer object out; models were trained with it.
    return [tool if "type" in tool else {"type": "function", "function": tool} for tool in tools]


def _with_system(value: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The messages led by the record's `system` text, unless they begin with one of their own."""
    system = _typed(value, "system", str, default="")
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _check(conversation: Conversation) -> None:
    answers = conversation.assistant_messages
    if not answers:
        raise BrokenRecord(
            NO_ASSISTANT, f"roles {shown([m['role'] for m in conversation.messages])}"
        )
    for answer, trained in zip(answers, conversation.trained, strict=True):
        if trained and not answer["content"].strip() and not answer.get("tool_calls"):
            raise BrokenRecord(EMPTY_ASSISTANT, f"content is {shown(answer['content'])}")
    try:
        "".join(strings([conversation.messages, conversation.tools])).encode()
    except UnicodeEncodeError as error:
        raise BrokenRecord(
            NOT_ENCODABLE, f"{error.object[error.start]!r}, a lone surrogate"
        ) from error


def _text(content: Any) -> str:
    """Content as one string; a list of text parts is joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_text(part) for part in content)
    raise BrokenRecord(WRONG_TYPE, f"a message's content is {shown(content)}, not text")


def _part_text(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
    if not isinstance(text, str):
        raise BrokenRecord(WRONG_TYPE, f"a part of a message's content is {shown(part)}, not text")
    return text


def _parsed(value: Any) -> Any:
    """`value`, or what it says if it is a string of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BrokenRecord(WRONG_TYPE, f"{shown(value)} is not JSON ({error})") from error


def _either(entry: dict[str, Any], key: str, other: str) -> Any:
    if key not in entry and other not in entry:
        raise BrokenRecord(MISSING_FIELD, f"neither {key} nor {other} in {shown(entry)}")
    return entry[key] if key in entry else entry[other]


def _typed(value: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """`value[key]`, checked to be of type `kind`; `default` if it is absent and one is given."""
    found = value.get(key, default)
    if found is None:
        raise BrokenRecord(MISSING_FIELD, f"no {key} in {shown(value)}")
    if not isinstance(found, kind):
        raise BrokenRecord(WRONG_TYPE, f"{key} is {shown(found)}, not {kind.__name__}")
    return found
