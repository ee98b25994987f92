"""The messages of a record, in their various forms, as turns of a conversation."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_profit.data.chat import masks, thoughts
from megatron_profit.data.chat.tool_calls import read_calls
from megatron_profit.data.errors import BrokenRecord, shown
from megatron_profit.data.files.fields import (
    WRONG_TYPE,
    either,
    listed,
    read,
    text,
    typed,
    without_nulls,
)

UNKNOWN_ROLE = "a role is not known"
TWO_THOUGHTS = "a message has a reasoning field and other thoughts in its content"
TWO_CALLS = "a message has both tool_calls and function_call"
OTHER_CALLS = "a message has tool calls in a field that is not read"

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
# Names of a message's reasoning; the first one with a value counts.
REASONING = ("reasoning_content", "reasoning", "thinking")
# Names of its tool calls; the latter is OpenAI's older form, of one call.
_CALLS = ("tool_calls", "function_call")
# Other trainers' names of them, for example `function_calls` and `toolCalls`.
_LIKE_CALLS = re.compile(r"(?:tool|function)[-_ ]?calls?", re.IGNORECASE)
_NO_CALLS = ("", "[]", "{}", "null", "none", "false")
# Names of the tools, in a record or in its leading system message.
TOOLS = ("tools", "functions")
_EVERY_MESSAGE = frozenset({"role", "from", "content", "value", *masks.MESSAGE_FIELDS})
_CALLING_MESSAGE = _EVERY_MESSAGE.union(REASONING)
_ASSISTANT_MESSAGE = _CALLING_MESSAGE.union(_CALLS)
_OTHER_MESSAGE = _EVERY_MESSAGE | {"name", "tool_call_id"}
_SYSTEM_MESSAGE = _OTHER_MESSAGE.union(TOOLS)
_PART = frozenset({"type", "text", *masks.MESSAGE_FIELDS})

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message as a chat template takes it, and the record's other words on it.

    Attributes:
        message: It has `role` and `content`, and where the record has them `reasoning_content`, `tool_calls`,
            `tool_call_id` and `name`.
        trained: Whether it may be trained, if it is the assistant's.
        unread: Fields with a value that is not read.
        nulls: Whether null arguments of its tool calls were left out.
        tools: The lists of tools that it offers, if it is the system's.
    """

    message: Message
    trained: bool = True
    unread: frozenset[str] = frozenset()
    nulls: bool = False
    tools: tuple[Any, ...] = ()


def read_messages(entries: Any) -> list[Turn]:
    """Return the turns of a list of messages; the list and each message may be JSON text.

    Everything that the assistant says before the tools answer is one turn, however many messages a record
    writes it in. For example, a message of tool calls alone continues the assistant's message before it. Any
    message of the assistant continues one that holds thoughts alone.

    Raises:
        BrokenRecord: A message cannot be used.
    """
    messages = read(entries)
    if not isinstance(messages, list):
        raise BrokenRecord(WRONG_TYPE, f"the list of messages is {shown(messages)}")
    return joined([_turn(read(entry)) for entry in messages])


def joined(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns; each turn that continues the one before it is joined to that one."""
    whole: list[Turn] = []
    for turn in turns:
        if whole and _goes_on(whole[-1].message, turn.message):
            whole[-1] = _joined(whole[-1], turn)
        else:
            whole.append(turn)
    return whole


def exchange(query: str, answer: str) -> list[Turn]:
    """Return a question and its answer."""
    said = {"role": "user", "content": query}, {"role": "assistant", "content": answer}
    return [Turn(message) for message in said]


def is_empty(message: Mapping[str, Any]) -> bool:
    """Return whether an assistant message has no answer: no call, and no text besides thoughts."""
    answer = thoughts.split(message["content"])[1]
    return not answer.strip() and not message.get("tool_calls")


def _turn(entry: Any) -> Turn:
    if not isinstance(entry, dict):
        raise BrokenRecord(WRONG_TYPE, f"a message is {shown(entry)}, not an object")
    entry = {key: item for key, item in entry.items() if item is not None}
    name = either(entry, "role", "from")
    if not isinstance(name, str) or name not in ROLES:
        raise BrokenRecord(UNKNOWN_ROLE, f"{shown(name)}; known are {', '.join(ROLES)}")
    role = ROLES[name]
    if role == "assistant":
        return _answer(entry, calls_as_text=name in CALL_ROLES)
    present = [key for key in ("name", "tool_call_id") if key in entry]
    identifiers = {key: typed(entry, key, str) for key in present}
    content = either(entry, "content", "value")
    message = {"role": role, "content": text(content), **identifiers}
    is_system, parts = role == "system", _parts(content)
    unread = entry.keys() - (_SYSTEM_MESSAGE if is_system else _OTHER_MESSAGE)
    unread |= masks.unheeded(entry) | _unread_of(parts)
    unread |= {f"content.{key}" for part in parts for key in masks.unheeded(part)}
    tools = tuple(offered(entry)) if is_system else ()
    return Turn(message, unread=frozenset(unread), tools=tools)


def offered(fields: Mapping[str, Any]) -> list[Any]:
    """Return the lists of tools among the fields of a record or a message, under whichever name."""
    given = [fields[name] for name in TOOLS if name in fields]
    return [tools for tools in given if listed(without_nulls(tools))]


def _parts(content: Any) -> list[dict[str, Any]]:
    """Return the fields of each part of a content; a part that is a text has none."""
    parts = content if isinstance(content, list) else []
    return [without_nulls(part) if isinstance(part, dict) else {} for part in parts]


def _unread_of(parts: Iterable[Mapping[str, Any]]) -> set[str]:
    return {f"content.{key}" for part in parts for key in part.keys() - _PART}


def _answer(entry: dict[str, Any], *, calls_as_text: bool) -> Turn:
    """Return the turn of an assistant's message; its calls may stand where other messages have their text."""
    # A template tells a missing reasoning field from an empty one: only if it is missing does it look for
    # <think> in the content.
    reasons = (typed(entry, name, str, default="") for name in REASONING)
    reasoning = next(filter(None, reasons), "")
    if calls_as_text:
        known = _CALLING_MESSAGE
        content, given = _thoughts_and_rest(either(entry, "content", "value"))
    else:
        known, given = _ASSISTANT_MESSAGE, _calls(entry)
        is_needed = given is None and not reasoning
        has_content = "content" in entry or "value" in entry or is_needed
        content = either(entry, "content", "value") if has_content else ""
    unread = entry.keys() - known
    _check_unread(entry, unread)
    calls, nulls = read_calls(given)
    message: Message = {"role": "assistant", "content": text(content)}
    if calls:
        message["tool_calls"] = calls
    if reasoning:
        message["reasoning_content"] = reasoning
        message["content"] = _without_thoughts(message["content"], reasoning)
    parts = _parts(content)
    unread |= _unread_of(parts)
    return Turn(message, masks.trained(entry, parts), frozenset(unread), nulls)


def _check_unread(entry: Mapping[str, Any], unread: Iterable[str]) -> None:
    """Refuse tool calls in a field that is not read: the turn would be trained without its calls."""
    for name in sorted(unread):
        if _LIKE_CALLS.fullmatch(name) and str(entry[name]).strip().lower() not in _NO_CALLS:
            raise BrokenRecord(
                OTHER_CALLS, f"{name} is {shown(entry[name])}; name the field tool_calls"
            )


def _without_thoughts(content: str, reasoning: str) -> str:
    """Return the content without a think block that repeats the reasoning.

    A template would write such a block twice.

    Raises:
        BrokenRecord: The block holds other thoughts.
    """
    block, answer = thoughts.split(content)
    if answer == content:
        block, close, answer = content.partition(thoughts.CLOSE)
        if not close or block.strip() != reasoning.strip():  # an answer that may mention the tag
            return content
    if block.strip() not in ("", reasoning.strip()):
        raise BrokenRecord(TWO_THOUGHTS, f"{shown(reasoning)} and {shown(block)}")
    return answer.lstrip("\r\n")


def _thoughts_and_rest(value: Any) -> tuple[str, Any]:
    """Return the think block of a text with its tags ("" without one) and the text after it."""
    rest = thoughts.split(value)[1] if isinstance(value, str) else value
    if rest == value:
        return "", value
    return value.removesuffix(rest.lstrip()), rest


def _calls(entry: dict[str, Any]) -> Any:
    given = [entry[name] for name in _CALLS if name in entry and listed(without_nulls(entry[name]))]
    if len(given) > 1:
        raise BrokenRecord(TWO_CALLS, shown(given))
    return given[0] if given else None


def _goes_on(message: Message, following: Message) -> bool:
    """Return whether the following message belongs to the turn that the assistant's message begins."""
    if not message["role"] == following["role"] == "assistant":
        return False
    if "reasoning_content" in following:
        return False
    only_calls = "tool_calls" in following and not following["content"].strip()
    has_thoughts = "reasoning_content" in message or bool(message["content"].strip())
    return only_calls or (has_thoughts and is_empty(message))


def _joined(turn: Turn, following: Turn) -> Turn:
    if turn.trained != following.trained:
        raise BrokenRecord(
            masks.UNCLEAR, "one message of the assistant's turn is trained, the other is not"
        )
    one, other = turn.message, following.message
    message = one | {"content": one["content"] + other["content"]}
    if calls := one.get("tool_calls", []) + other.get("tool_calls", []):
        message["tool_calls"] = calls
    unread, nulls = turn.unread | following.unread, turn.nulls or following.nulls
    return Turn(message, turn.trained, unread, nulls)
