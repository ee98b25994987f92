"""Turns raw records of the common chat formats into the messages that chat templates take.

A record that cannot be used raises `BrokenRecord` with a reason from a fixed list, so that the preparation
can continue and count. Where the first record of a file is in a format that is not known, the file is
refused.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_profit.data.chat import masks, thoughts
from megatron_profit.data.chat.messages import (
    ROLES,
    TOOLS,
    Message,
    Turn,
    exchange,
    is_empty,
    joined,
    offered,
    read_messages,
)
from megatron_profit.data.chat.tool_calls import read_tools
from megatron_profit.data.errors import BrokenRecord, DataError, shown
from megatron_profit.data.files.fields import (
    MISSING_FIELD,
    WRONG_TYPE,
    listed,
    read,
    strings,
    text,
    typed,
)
from megatron_profit.data.files.records import RawRecord
from megatron_profit.data.files.sources import ColumnMapping
from megatron_profit.data.files.splits import PLAIN_TEXT

EMPTY_ASSISTANT = "an assistant turn is empty"
NO_ASSISTANT = "there is no assistant turn"
THOUGHTS_END_INSIDE = "a reasoning text holds the tag that ends it"
THOUGHTS_NEVER_END = "an answer begins with <think> and never ends its thoughts"
NOT_ENCODABLE = "a text cannot be encoded as UTF-8"
UNKNOWN_FORMAT = "the format is not known"
TWO_LISTS = "a record has two lists of tools"
LATER_TOOLS = "a system message after the first message offers tools"
TEXT_OR_MESSAGES = "it is not clear whether a completion is a text or a list of messages"
PREFERENCES = "the answer stands in two fields, chosen and rejected"
NOT_TEXT = "a text stands for a picture, a video or a sound"

# Fields that are read in each format; `functions` is OpenAI's older name of the tools.
_EVERY_RECORD = frozenset({"system", *TOOLS})
_RECORD_FIELDS = {
    "messages": _EVERY_RECORD | {"messages"},
    "conversations": _EVERY_RECORD | {"conversations"},
    "alpaca": _EVERY_RECORD | {"instruction", "input", "output", "history"},
    "completion": _EVERY_RECORD | {"prompt", "completion"},
}

# Fields of pictures and the like. In a text `<image>` stands for one in `image` or `images`.
_MEDIA_FIELDS = frozenset({"image", "images", "video", "videos", "audio", "audios"})

# A text that begins as messages do is no text of its own, also where it is not JSON. For example, a table's
# cell may hold what Python prints, [{'role': 'user', 'content': 'Hi'}].
_MESSAGES_BEGIN = re.compile(
    r"""\s*\[\s*\{(?=.*?["'](?:content|value)["']\s*:).*?["'](?:role|from)["']\s*:\s*["']"""
    rf"""(?:{"|".join(ROLES)})["']""",
    re.DOTALL,
)

FORMATS = (
    "alpaca (instruction, input, output; optional system, history, tools)",
    "sharegpt (conversations: a list of from, value; optional system, tools)",
    "OpenAI (messages: a list of role, content; optional tools)",
    "prompt and completion",
)


def is_read(layout: ColumnMapping) -> Callable[[str], bool]:
    """Return a function that says, by its name, whether `normalise` reads a field of a record."""
    named = frozenset(layout.columns.values()) or frozenset().union(*_RECORD_FIELDS.values())
    return lambda name: name in named or masks.may_mask(name)


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages and tools that a chat template takes.

    Attributes:
        messages: Each has `role` (system, user, assistant or tool) and `content` (str), and where
            the record has them `reasoning_content`, `tool_calls`, `tool_call_id` and `name`.
        tools: JSON schemas of the tools offered to the model, None without any.
        untrained: Positions of the messages that the record gives the weight 0: context only.
        unread: Unread fields of the record that have a value; a field of its messages is called
            "messages.NAME".
        nulls: Whether null fields of its tool calls or tools were left out.
        goes_on: Whether the assistant's next message in the record directly follows the last one here.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    untrained: frozenset[int] = frozenset()
    unread: frozenset[str] = frozenset()
    nulls: bool = False
    goes_on: bool = False

    @property
    def positions(self) -> list[int]:
        """Positions of the assistant's messages."""
        return [i for i, turn in enumerate(self.messages) if turn["role"] == "assistant"]

    @property
    def assistant_messages(self) -> list[Message]:
        return [self.messages[i] for i in self.positions]


def normalise(record: RawRecord, layout: ColumnMapping | None = None) -> Conversation:
    """Return the conversation of a raw record in any known format.

    Without a layout the keys tell the format: `messages`, `conversations`, `instruction` or `output`, or
    else `prompt` and `completion`. For example, {"prompt": "Hi", "completion": "Hello"} is a question and an
    answer. Entries may name their fields role and content or from and value in either of the first two.

    Raises:
        DataError: The first record of its file has none of these keys.
        BrokenRecord: A later one has none of them, or the record cannot be used.
    """
    if record.broken:
        raise record.broken
    layout = layout or ColumnMapping()
    renamed = layout.renamed(record.value)
    value = {key: item for key, item in renamed.items() if item is not None}
    kind = _format(value)
    is_half = record.first and not layout.columns and _is_half_alpaca(record.value)
    if kind is None or is_half:
        raise _unknown_format(record, empty=not is_half and _format(renamed) is not None)
    named = layout.columns.values()
    masks.check_record({k: item for k, item in record.value.items() if k not in named})
    is_mapped = kind == "alpaca" and bool(layout.columns)
    turns = _mapped_turns(value) if is_mapped else _READERS[kind](value)
    _check_elsewhere(record.value, turns)
    unread = value.keys() - _RECORD_FIELDS[kind] | layout.unnamed(record.value)
    unread -= masks.heeded(record.value)
    unread |= {f"messages.{name}" for turn in turns for name in turn.unread}
    if value.get("system") and turns and turns[0].message["role"] == "system":
        unread.add("system")
    tools, nulls = read_tools(_offered(value, turns))
    turns = _with_system(value, turns)
    conversation = Conversation(
        messages=[turn.message for turn in turns],
        tools=tools,
        untrained=frozenset(i for i, turn in enumerate(turns) if not turn.trained),
        unread=frozenset(unread),
        nulls=nulls or any(turn.nulls for turn in turns),
    )
    _check(conversation)
    return conversation


def _check_elsewhere(fields: dict[str, Any], turns: Sequence[Turn]) -> None:
    """Refuse a record whose answer, or a part of whose question, stands in fields that are not read."""
    given = {name for name, value in fields.items() if value not in (None, "", [])}
    if given >= {"chosen", "rejected"} and turns and turns[-1].message["role"] != "assistant":
        raise BrokenRecord(
            PREFERENCES,
            f"the last message is the {turns[-1].message['role']}'s; add the one in chosen to the messages",
        )
    for name in sorted(given & _MEDIA_FIELDS):
        tag = f"<{name.removesuffix('s')}>"
        if any(tag in turn.message["content"] for turn in turns):
            raise BrokenRecord(NOT_TEXT, f"{tag} stands for what is in {shown(name)}")


def _format(value: dict[str, Any]) -> str | None:
    """Return the format that the keys tell."""
    for kind in ("messages", "conversations"):
        if kind in value:
            return kind
    if "instruction" in value or "output" in value:
        return "alpaca"
    return "completion" if "prompt" in value and "completion" in value else None


def _is_half_alpaca(fields: dict[str, Any]) -> bool:
    """Return whether the keys tell alpaca, but one of its columns has another name here."""
    return _format(fields) == "alpaca" and not fields.keys() >= {"instruction", "output"}


def _unknown_format(record: RawRecord, *, empty: bool) -> Exception:
    found = f"found the keys {shown(list(record.value))}"
    if empty:
        return BrokenRecord(MISSING_FIELD, f"{found}, of which one that is needed holds null")
    if not record.first:
        return BrokenRecord(UNKNOWN_FORMAT, found)
    plain = f". With a field text alone: {PLAIN_TEXT}" if "text" in record.value else ""
    return DataError(
        f"{record.where}: the format is not known, {found}; known are {'; '.join(FORMATS)}. Rename "
        "the fields to one of these, or name the columns, e.g. --data-columns prompt=question "
        f"response=answer{plain}"
    )


def _alpaca_turns(value: dict[str, Any]) -> list[Turn]:
    turns: list[Turn] = []
    for pair in listed(value.get("history")):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise BrokenRecord(WRONG_TYPE, f"history holds {shown(pair)}, not a pair of texts")
        turns += exchange(text(pair[0]), text(pair[1]))
    parts = (typed(value, "instruction", str), typed(value, "input", str, default=""))
    query = "\n".join(part for part in parts if part)
    return turns + exchange(query, typed(value, "output", str))


def _mapped_turns(value: dict[str, Any]) -> list[Turn]:
    """Return the turns of named columns: a prompt alone, and its response, may be lists of messages."""
    if value.get("input") or value.get("history"):
        return _alpaca_turns(value)
    return _completed(value["instruction"], value["output"])


def _completed(prompt: Any, completion: Any) -> list[Turn]:
    """Return the turns of a prompt and a completion: texts or lists of messages, the first context only."""
    lists = [_messages_of(prompt), _messages_of(completion)]
    if None in lists:
        lists = [found if _names_a_role(found) else None for found in lists]
    question = {"role": "user", "content": prompt}
    answered = {"role": "assistant", "content": completion}
    if lists == [None, None]:
        return read_messages([question, answered])
    if lists[0] is None and isinstance(completion, str):
        raise BrokenRecord(
            TEXT_OR_MESSAGES,
            f"{shown(completion)} for a prompt that is a text; write both as lists of messages",
        )
    asked = [question] if lists[0] is None else lists[0]
    context = [replace(turn, trained=False) for turn in read_messages(asked)]
    answer = read_messages([answered] if lists[1] is None else lists[1])
    meeting = [turn.message["role"] for turn in (*context[-1:], *answer[:1])]
    if meeting == ["assistant", "assistant"]:
        raise BrokenRecord(
            masks.UNCLEAR,
            "the completion goes on with the answer that the prompt begins; write the whole answer in it",
        )
    return joined(context + answer)


def _messages_of(value: Any) -> list[Any] | None:
    """Return a list of messages, which may be JSON text as each of them; None for a text of its own.

    Raises:
        BrokenRecord: It is a list of several texts, or begins like a list of messages and is not JSON.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = read(value)
        except BrokenRecord:
            if _MESSAGES_BEGIN.match(value):
                raise
            return None  # a text that begins with a bracket
        entries = [_message_of(entry) for entry in value]
        messages = [
            isinstance(entry, dict) and bool(entry.keys() & {"role", "from"}) for entry in entries
        ]
        return entries if (messages and all(messages)) or _names_a_role(entries) else None
    if not isinstance(value, list):
        return None
    entries = [_message_of(entry) for entry in value]
    if len(entries) > 1 and any(isinstance(entry, str) for entry in entries):
        raise BrokenRecord(WRONG_TYPE, f"{shown(value)} is neither a text nor a list of messages")
    return entries


def _message_of(entry: Any) -> Any:
    """Return an object that is JSON text as an object; anything else as it is."""
    if not (isinstance(entry, str) and entry.lstrip().startswith("{")):
        return entry
    try:
        return read(entry)
    except BrokenRecord:
        if _MESSAGES_BEGIN.match(f"[{entry}"):
            raise
        return entry  # a text that begins with a brace


def _names_a_role(entries: list[Any] | None) -> bool:
    """Return whether one of the entries is a message of a known role."""
    objects = [entry for entry in entries or () if isinstance(entry, dict)]
    return any(entry.get(name) in tuple(ROLES) for entry in objects for name in ("role", "from"))


_READERS: dict[str, Callable[[dict[str, Any]], list[Turn]]] = {
    "messages": lambda value: read_messages(value["messages"]),
    "conversations": lambda value: read_messages(value["conversations"]),
    "alpaca": _alpaca_turns,
    "completion": lambda value: _completed(value["prompt"], value["completion"]),
}


def _offered(value: dict[str, Any], turns: list[Turn]) -> Any:
    """Return the tools of the record or of its leading system message."""
    given = offered(value) + [tools for turn in turns[:1] for tools in turn.tools]
    if any(turn.tools for turn in turns[1:]):
        raise BrokenRecord(LATER_TOOLS, "write the tools in the record's field tools")
    lists = [listed(tools) for tools in given]
    if any(other != lists[0] for other in lists[1:]):
        raise BrokenRecord(TWO_LISTS, shown(given))
    return given[0] if given else None


def _with_system(value: dict[str, Any], turns: list[Turn]) -> list[Turn]:
    """Return the turns led by the record's `system` text, unless they begin with one of their own."""
    system = typed(value, "system", str, default="")
    if not system or (turns and turns[0].message["role"] == "system"):
        return turns
    return [Turn({"role": "system", "content": system}), *turns]


def _check(conversation: Conversation) -> None:
    answers = conversation.positions
    if not answers:
        raise BrokenRecord(
            NO_ASSISTANT, f"roles {shown([m['role'] for m in conversation.messages])}"
        )
    for position in answers:
        answer = conversation.messages[position]
        if position not in conversation.untrained and is_empty(answer):
            raise BrokenRecord(EMPTY_ASSISTANT, f"content is {shown(answer['content'])}")
        if position not in conversation.untrained and thoughts.never_end(answer["content"]):
            raise BrokenRecord(THOUGHTS_NEVER_END, f"content is {shown(answer['content'])}")
        if thoughts.CLOSE in answer.get("reasoning_content", ""):
            raise BrokenRecord(
                THOUGHTS_END_INSIDE, f"{thoughts.CLOSE} in {shown(answer['reasoning_content'])}"
            )
    try:
        "".join(strings([conversation.messages, conversation.tools])).encode()
    except UnicodeEncodeError as error:
        raise BrokenRecord(
            NOT_ENCODABLE, f"{error.object[error.start]!r}, a lone surrogate"
        ) from error
