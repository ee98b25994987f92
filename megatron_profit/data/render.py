"""Conversations -> token ids and the mask of what the model must produce.

A conversation is rendered once, whole, with the tokenizer's own chat template, and tokenised once:
templates such as Qwen3's write an assistant turn differently according to its place, so rendering
message by message gives a text that the model never sees at inference. What is supervised is then
found by character position: after the assistant header up to and including the end of the turn.
Both markers are learnt from the template itself. Positions, never token values, decide the mask:
where pad and end-of-turn are one token, the end is still trained.

Shape suffix: T tokens of one conversation.
"""

import re
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_profit.data.chat import Conversation, Message, strings
from megatron_profit.data.errors import BrokenRecord, DataError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FAILED = "the chat template refuses the conversation"
MARKER_IN_TEXT = "a text holds the chat template's own turn markers"
TURNS_NOT_FOUND = "the rendered text does not show each assistant turn once"

# No template writes these, and they differ from the first character on.
_ASKED, _ANSWERED, _ASKED_AGAIN, _ANSWERED_AGAIN = "7vAsk7", "8vSay8", "6vQue6", "9vEnd9"


@dataclass(frozen=True, slots=True)
class TurnMarkers:
    """How a template brackets what the assistant says.

    Attributes:
        header: Text right before every assistant turn, e.g. "<|im_start|>assistant\\n".
        end: Text that ends the turn, e.g. "<|im_end|>"; the model must produce it.
        opening: Token that begins a turn of any role, e.g. "<|im_start|>"; "" if there is none.
    """

    header: str
    end: str
    opening: str


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """Token ids of a conversation.

    Attributes:
        ids: [T] int32.
        supervised: [T] bool, true where the model must produce this token.
    """

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template and marks the assistant's tokens.

    Attributes:
        markers: What was learnt from the template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Learns the turn markers of the tokenizer's template.

        Args:
            tokenizer: A fast tokenizer (one that knows character offsets) with a chat template.

        Raises:
            DataError: The tokenizer is not fast, has no template, or its template writes no
                assistant header or no end of turn, so that no one could tell what to train on.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{_name(tokenizer)} is a slow tokenizer without character offsets; load it with "
                "AutoTokenizer from a directory that has a tokenizer.json"
            )
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{_name(tokenizer)} has no chat template; use an instruct model's tokenizer, "
                "or add chat_template.jinja to the tokenizer's directory"
            )
        self._tokenizer = tokenizer
        self.markers = self._learn_markers()

    def render(self, conversation: Conversation) -> RenderedConversation:
        """Token ids and supervised mask of a conversation.

        The ids equal `tokenizer.apply_chat_template(messages, tools=tools)`. A token is supervised
        if it begins inside an assistant turn; one that begins in the header and reaches into the
        turn is not, since at generation its beginning is already written.

        Raises:
            BrokenRecord: The template refuses the conversation, or the turns in the text are
                ambiguous.
        """
        text = self.text(conversation)
        encoding = self._encode(text)
        ids_T = np.asarray(encoding["input_ids"], dtype=np.int32)
        offsets_T2 = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return RenderedConversation(
            ids_T, _begins_inside(offsets_T2, self.spans(text, conversation))
        )

    def text(self, conversation: Conversation) -> str:
        """The whole conversation as the template writes it.

        Raises:
            BrokenRecord: The template refuses the conversation.
        """
        try:
            return self._apply(conversation.messages, tools=conversation.tools)
        except Exception as error:  # a template is a program: it may fail in any way on odd data
            raise BrokenRecord(
                TEMPLATE_FAILED, f"{type(error).__name__}: {shown(str(error))}"
            ) from error

    def spans(self, text: str, conversation: Conversation) -> list[tuple[int, int]]:
        """Where in the rendered text the assistant's turns are, in order.

        Returns:
            For each assistant message the character positions [begin, end): from after the header
            to after the end-of-turn text.

        Raises:
            BrokenRecord: A message holds a marker literally, or there are not as many turns as
                assistant messages.
        """
        self._refuse_markers_inside(conversation)
        headers = list(re.finditer(re.escape(self.markers.header), text))
        limits = [header.start() for header in headers[1:]] + [len(text)]
        spans = [
            self._turn(text, header.end(), limit)
            for header, limit in zip(headers, limits, strict=False)
        ]
        expected = len(conversation.assistant_messages)
        if len(spans) != expected:
            raise BrokenRecord(
                TURNS_NOT_FOUND,
                f"{expected} assistant messages, {len(spans)} turns in {shown(text)}",
            )
        return spans

    def _turn(self, text: str, begin: int, limit: int) -> tuple[int, int]:
        """The turn from `begin`; it must end before `limit` and before any other turn begins."""
        end = text.find(self.markers.end, begin, limit)
        turn = text[begin:end]
        if end < 0 or (self.markers.opening and self.markers.opening in turn):
            raise BrokenRecord(
                TURNS_NOT_FOUND, f"no {self.markers.end!r} ends the turn {shown(text[begin:limit])}"
            )
        return begin, end + len(self.markers.end)

    def _refuse_markers_inside(self, conversation: Conversation) -> None:
        header, end = self.markers.header, self.markers.end
        if any(header in text for text in strings([conversation.messages, conversation.tools])):
            raise BrokenRecord(MARKER_IN_TEXT, f"{header!r} in a message or tool")
        if any(end in text for text in strings(conversation.assistant_messages)):
            raise BrokenRecord(MARKER_IN_TEXT, f"{end!r} in an assistant message")

    def _learn_markers(self) -> TurnMarkers:
        probe = self._probe()
        common = self._common_tokens(probe.after_earlier, probe.after_last)
        if not common.strip():
            raise DataError(
                f"the chat template of {_name(self._tokenizer)} writes no end of turn after what "
                "the assistant says, so the model would never learn to stop: an earlier answer is "
                f"followed by {probe.after_earlier!r}, the last one by {probe.after_last!r}; "
                "write the same end-of-turn token after both"
            )
        header = self._header(probe)
        opening = self._common_tokens(probe.after_earlier.removeprefix(common), header)
        # Ordinary text, such as "###", may well stand in an answer; it would not tell turns apart.
        is_token = opening in self._tokenizer.get_added_vocab()
        return TurnMarkers(header, common.rstrip(), opening if is_token else "")

    def _header(self, probe: "_Probe") -> str:
        """What the generation prompt, an earlier answer's beginning and the last one's share.

        A think block that only some of them open thus belongs to the turn, not to the header.
        """
        beginnings = [probe.prompt, probe.before_earlier, probe.before_last]
        bracket = _common_prefix(beginnings)
        header = bracket.removeprefix(probe.after_question)
        if not header.strip() or not bracket.startswith(probe.after_question):
            raise DataError(
                f"the chat template of {_name(self._tokenizer)} writes no header before what the "
                "assistant says: a question is followed by "
                f"{', '.join(map(repr, beginnings))} in the generation prompt, before an earlier "
                "answer and before the last; write the same header in all three"
            )
        return header

    def _probe(self) -> "_Probe":
        question, answer = _said("user", _ASKED), _said("assistant", _ANSWERED)
        again = [_said("user", _ASKED_AGAIN), _said("assistant", _ANSWERED_AGAIN)]
        try:
            plain = self._apply([question])
            prompt = self._apply([question], add_generation_prompt=True)
            talk = self._apply([question, answer, *again])
            return _Probe(
                after_question=_after(plain, _ASKED),
                prompt=_after(prompt, _ASKED),
                before_earlier=_between(talk, _ASKED, _ANSWERED),
                before_last=_between(talk, _ASKED_AGAIN, _ANSWERED_AGAIN),
                after_earlier=_between(talk, _ANSWERED, _ASKED_AGAIN),
                after_last=_after(talk, _ANSWERED_AGAIN),
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise DataError(
                f"the chat template of {_name(self._tokenizer)} cannot render two plain questions "
                f"and answers ({type(error).__name__}: {error}); correct the template"
            ) from error

    def _common_tokens(self, first: str, second: str) -> str:
        """The text of the leading tokens that two texts share (characters could cut a token)."""
        encoding, other = self._encode(first), self._encode(second)
        pairs = zip(encoding["input_ids"], other["input_ids"], strict=False)
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        return first[: encoding["offset_mapping"][shared - 1][1]] if shared else ""

    def _apply(self, messages: list[Message], **options: Any) -> str:
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        if not isinstance(text, str):
            raise TypeError(f"the chat template gave {type(text).__name__}, not text")
        return text

    def _encode(self, text: str) -> Any:
        return self._tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )


@dataclass(frozen=True, slots=True)
class _Probe:
    """What a template writes around sentinels, in the places where turns may differ.

    Two questions and answers are rendered, and the first question alone without and with the
    generation prompt. `after_question` is what ends the lone question, `prompt` that and the
    generation prompt; the rest surrounds the first answer (`earlier`) and the second (`last`).
    """

    after_question: str
    prompt: str
    before_earlier: str
    before_last: str
    after_earlier: str
    after_last: str


def _common_prefix(texts: list[str]) -> str:
    columns = enumerate(zip(*texts, strict=False))
    length = next((i for i, column in columns if len(set(column)) > 1), min(map(len, texts)))
    return texts[0][:length]


def _begins_inside(
    offsets_T2: npt.NDArray[np.int64], spans: list[tuple[int, int]]
) -> npt.NDArray[np.bool_]:
    """[T] bool: the token begins inside one of the spans.

    Some tokenizers trim spaces from the offsets, which leaves a token of spaces at the end of a
    header with the empty range (begin, begin): hence `last > begin`.
    """
    first_T, last_T = offsets_T2.T
    inside_T = np.zeros(len(offsets_T2), dtype=np.bool_)
    for begin, end in spans:
        inside_T |= (first_T >= begin) & (first_T < end) & (last_T > begin)
    return inside_T


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _after(text: str, sentinel: str) -> str:
    if text.count(sentinel) != 1:
        raise ValueError(
            f"the message {sentinel!r} appears {text.count(sentinel)} times in {text!r}"
        )
    return text.partition(sentinel)[2]


def _between(text: str, sentinel: str, following: str) -> str:
    _after(text, following)
    return _after(text, sentinel).partition(following)[0]


def _name(tokenizer: object) -> str:
    path = getattr(tokenizer, "name_or_path", "")
    return f"the tokenizer {path}" if path else f"the tokenizer ({type(tokenizer).__name__})"
