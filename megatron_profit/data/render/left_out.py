"""Checks for text that a chat template leaves out of a conversation, or writes twice.

Its text is compared with the record.

Templates trim texts, and write strings of tool calls either unchanged or as JSON. Any other missing text was
dropped or cut. For example, Qwen3's template cuts an answer at each `</think>`.
"""

import json
import re
from typing import Any

from megatron_profit.data.chat import thoughts
from megatron_profit.data.chat.conversations import Conversation
from megatron_profit.data.chat.messages import Message
from megatron_profit.data.errors import BrokenRecord, shown
from megatron_profit.data.files.fields import strings

# A text that begins and ends with the tags of one name.
_TAGGED = re.compile(r"(<(\w+)>).*</\2>", re.DOTALL)

ANSWER_LEFT_OUT = "the chat template leaves out or cuts a part of an answer"


def check_answer(message: Message, turn: str) -> bool | None:
    """Check that the template writes an answer and its tool calls whole.

    It may drop the thoughts, but not cut them.

    Args:
        message: An assistant message.
        turn: The template's text for it, after the header and without the end of turn.

    Returns:
        Whether the thoughts are in the text, None where the message has none.

    Raises:
        BrokenRecord: A part of the answer or of the thoughts is missing.
    """
    for text in _answer_parts(message, turn):
        if not _holds(turn, text):
            raise BrokenRecord(ANSWER_LEFT_OUT, f"{shown(text)} is not in {shown(turn)}")
    reasoning = message.get("reasoning_content") or thoughts.split(message["content"])[0]
    if not reasoning.strip():
        return None
    whole = _holds(turn, reasoning)
    if not whole and thoughts.split(turn)[0].strip():
        raise BrokenRecord(ANSWER_LEFT_OUT, f"of {shown(reasoning)} a part is in {shown(turn)}")
    return whole


def leaves_out_context(conversation: Conversation, text: str, trained: set[int]) -> bool:
    """Return whether the template leaves out a message that is not trained, or a tool.

    Args:
        conversation: The rendered conversation.
        text: The template's text.
        trained: Positions of the messages that are trained, which `check_answer` looks at.
    """
    context = [m for i, m in enumerate(conversation.messages) if i not in trained]
    parts = [part for message in context for part in _answer_parts(message, text)]
    parts += [name for tool in conversation.tools or () for name in _names(tool)]
    return not all(_holds(text, part) for part in parts)


def tagged_twice(conversation: Conversation, text: str) -> bool:
    """Return whether the template writes tags around a tool result that has them already.

    For example, Qwen3's template writes `<tool_response>` before each.
    """
    results = [m["content"].strip() for m in conversation.messages if m["role"] == "tool"]
    tags = [(found[1], result) for result in results if (found := _TAGGED.fullmatch(result))]
    return any(re.search(re.escape(tag) + r"\s*" + re.escape(result), text) for tag, result in tags)


def _answer_parts(message: Message, text: str) -> list[str]:
    """Return the texts that must be rendered: the content, if need be without its thoughts, and the calls."""
    content = message["content"]
    if message["role"] == "assistant" and not _holds(text, content):
        content = thoughts.split(content)[1]
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return [content, *strings([[call["name"], call["arguments"]] for call in calls])]


def _names(tool: dict[str, Any]) -> list[str]:
    """Return the name of a tool, none where it has no such field."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else tool.get("name")
    return [name] if isinstance(name, str) else []


def _holds(text: str, part: str) -> bool:
    """Return whether the text holds the part, as it is or within quotes of JSON or Python."""
    part = part.strip()
    if part in text:
        return True
    quoted = (json.dumps(part, ensure_ascii=False), json.dumps(part), repr(part))
    return any(spelling[1:-1] in text for spelling in quoted)
