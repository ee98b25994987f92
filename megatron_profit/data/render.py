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
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_profit.data.chat import Conversation, Message, strings
from megatron_profit.data.errors import BrokenRecord, DataError, shown
from megatron_profit.data.template_date import check_day, with_day

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FAILED = "the chat template refuses the conversation"
MARKER_IN_TEXT = "a text holds the chat template's own turn markers"
TURNS_NOT_FOUND = "the rendered text does not show each assistant turn once"

_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"

# No template writes these, and they differ from the first character on.
_ASKED, _ANSWERED, _ASKED_AGAIN, _ANSWERED_AGAIN = "7vAsk7", "8vSay8", "6vQue6", "9vEnd9"


@dataclass(frozen=True, slots=True)
class TurnMarkers:
    """How a template brackets what the assistant says.

    Attributes:
        header: Text right before every assistant turn, e.g. "<|im_start|>assistant\\n".
        end: Text that ends the turn, e.g. "<|im_end|>"; the model must produce it.
        opening: Token that begins a turn of any role, e.g. "<|im_start|>"; "" if there is none.
        end_id: Id of the first added token in `end`, at which generation has to stop; None where `end` is
            ordinary text only.
    """

    header: str
    end: str
    opening: str
    end_id: int | None


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """Token ids of a conversation.

    Attributes:
        ids: [T] int32.
        supervised: [T] bool, true where the model must produce this token.
    """

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Training:
    """Which parts of the assistant's turns are trained.

    Attributes:
        turns: "all", or the "last" only.
        think: Also what stands in <think> blocks; else a turn is trained from behind them.
    """

    turns: Literal["all", "last"] = "all"
    think: bool = True

    def __post_init__(self) -> None:
        if self.turns not in ("all", "last"):
            raise ValueError(f"turns is {self.turns!r}; it must be all or last")


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template and marks the assistant's tokens.

    Attributes:
        markers: What was learnt from the template.
        training: Which parts of the assistant's turns are marked.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        training: Training | None = None,
        day: date | None = None,
    ) -> None:
        """Learns the turn markers of the tokenizer's template.

        Args:
            tokenizer: A fast tokenizer (one that knows character offsets) with a chat template.
            training: Which parts of the assistant's turns are trained; all of them by default.
            day: What a template that writes today's date is to write; None for other templates.

        Raises:
            DataError: The tokenizer is not fast, has no template, its template writes no
                assistant header or no end of turn, so that no one could tell what to train on, or
                it writes a date and `day` is None, or the other way round.
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
        check_day(tokenizer, day, _name(tokenizer))
        self._tokenizer, self._day = tokenizer, day
        self.training = training or Training()
        self.markers = self._learn_markers()
        # Ordinary text that ends a turn may well stand in a question; a token would end it there.
        brackets = _tokens(tokenizer, self.markers.opening, self.markers.end)
        ends = _tokens(tokenizer, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
        self._never_inside = (self.markers.header, *brackets)
        self._never_said = (self.markers.end, *ends)

    def render(self, conversation: Conversation) -> RenderedConversation:
        """Token ids and supervised mask of a conversation.

        The ids equal `tokenizer.apply_chat_template(messages, tools=tools)`, on the day that was
        given where the template writes one. A token is supervised
        if it begins inside an assistant turn; one that begins in the header and reaches into the
        turn is not, since at generation its beginning is already written.

        Raises:
            BrokenRecord: The template refuses the conversation, or the turns in the text are
                ambiguous.
        """
        text = self.text(conversation)
        spans = self.trained_spans(text, conversation)
        return _marked(self._encode(text).encodings[0], spans)

    def render_all(
        self, conversations: Sequence[Conversation]
    ) -> list[RenderedConversation | BrokenRecord]:
        """`render` of several conversations, tokenised together; what it would raise is returned."""
        texts: list[str] = []
        spans: list[list[tuple[int, int]]] = []
        results: list[BrokenRecord | None] = []
        for conversation in conversations:
            try:
                text = self.text(conversation)
                spans.append(self.trained_spans(text, conversation))
                texts.append(text)
                results.append(None)
            except BrokenRecord as error:
                results.append(error)
        encodings = self._encode(texts).encodings if texts else []
        marked = iter(map(_marked, encodings, spans))
        return [result or next(marked) for result in results]

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

    def trained_spans(self, text: str, conversation: Conversation) -> list[tuple[int, int]]:
        """The parts of `spans` that are trained."""
        spans = self.spans(text, conversation)
        chosen = [
            span for span, trained in zip(spans, conversation.trained, strict=True) if trained
        ]
        if self.training.turns == "last":
            chosen = [span for span in chosen if span == spans[-1]]
        if self.training.think:
            return chosen
        header = self.markers.header
        opened = header.rfind(_THINK_OPEN) > header.rfind(_THINK_CLOSE)
        return [(_behind_thoughts(text, *span, opened=opened), span[1]) for span in chosen]

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
        everything = [conversation.messages, conversation.tools]
        _refuse(self._never_inside, everything, "a message or tool")
        _refuse(self._never_said, conversation.assistant_messages, "an assistant message")

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
        is_token = _tokens(self._tokenizer, opening)
        end = common.rstrip()
        end_id = self._added_id_after(probe.talk, _ANSWERED_AGAIN, end)
        return TurnMarkers(header, end, opening if is_token else "", end_id)

    def _added_id_after(self, text: str, sentinel: str, end: str) -> int | None:
        """Id of the first added token in the `end` that follows the sentinel, None if there is none."""
        begin = text.index(sentinel) + len(sentinel)
        limit = begin + text[begin:].index(end) + len(end)
        encoding = self._encode(text).encodings[0]
        added = set(self._tokenizer.get_added_vocab().values())
        inside = (
            token
            for token, (first, last) in zip(encoding.ids, encoding.offsets, strict=True)
            if begin <= first and last <= limit and token in added
        )
        return next(inside, None)

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
                talk=talk,
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise DataError(
                f"the chat template of {_name(self._tokenizer)} cannot render two plain questions "
                f"and answers ({type(error).__name__}: {error}); correct the template"
            ) from error

    def _common_tokens(self, first: str, second: str) -> str:
        """The text of the leading tokens that two texts share (characters could cut a token)."""
        encoding, other = self._encode(first).encodings[0], self._encode(second).encodings[0]
        pairs = zip(encoding.ids, other.ids, strict=False)
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        return first[: encoding.offsets[shared - 1][1]] if shared else ""

    def _apply(self, messages: list[Message], **options: Any) -> str:
        if self._day is not None:
            template = self._tokenizer.get_chat_template(tools=options.get("tools"))
            options["chat_template"] = with_day(template, self._day)
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        if not isinstance(text, str):
            raise TypeError(f"the chat template gave {type(text).__name__}, not text")
        return text

    def _encode(self, text: str | list[str]) -> Any:
        return self._tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, verbose=False
        )


@dataclass(frozen=True, slots=True)
class _Probe:
    """What a template writes around sentinels, in the places where turns may differ.

    Two questions and answers are rendered, and the first question alone without and with the
    generation prompt. `after_question` is what ends the lone question, `prompt` that and the
    generation prompt; the rest surrounds the first answer (`earlier`) and the second (`last`) in the
    whole `talk`.
    """

    after_question: str
    prompt: str
    before_earlier: str
    before_last: str
    after_earlier: str
    after_last: str
    talk: str


def _common_prefix(texts: list[str]) -> str:
    columns = enumerate(zip(*texts, strict=False))
    length = next((i for i, column in columns if len(set(column)) > 1), min(map(len, texts)))
    return texts[0][:length]


def _behind_thoughts(text: str, begin: int, end: int, *, opened: bool) -> int:
    """Where the turn [begin, end) goes on behind its think block; `begin` if it has none.

    The block begins the turn, or the header has `opened` it already; an answer may mention the tags, and
    may begin with spaces, which are its own.
    """
    close = text.find(_THINK_CLOSE, begin, end)
    if close < 0 or not (opened or text[begin:end].lstrip().startswith(_THINK_OPEN)):
        return begin
    rest = text[close + len(_THINK_CLOSE) : end]
    return end - len(rest.lstrip("\r\n"))


def _marked(encoding: Any, spans: list[tuple[int, int]]) -> RenderedConversation:
    """The ids of an encoding, supervised where a token begins inside one of the spans.

    Tokens are looked up by bisection: a Python list of all offsets would cost as much as the tokenizer.
    """
    ids_T = np.asarray(encoding.ids, dtype=np.int32)
    supervised_T = np.zeros(len(ids_T), dtype=np.bool_)
    tokens = range(len(ids_T))

    def first_char(token: int) -> int:
        return encoding.token_to_chars(token)[0]

    for begin, end in spans:
        first = bisect_left(tokens, begin, key=first_char)
        # Some tokenizers trim spaces from the offsets, which leaves a token of spaces at the end of a
        # header with the empty range (begin, begin).
        while first < len(ids_T) and encoding.token_to_chars(first) == (begin, begin):
            first += 1
        supervised_T[first : bisect_left(tokens, end, key=first_char)] = True
    return RenderedConversation(ids_T, supervised_T)


def _refuse(markers: Sequence[str], value: object, place: str) -> None:
    everything = "\0".join(strings(value))  # no marker holds what is between two texts
    for marker in markers:
        if marker in everything:
            raise BrokenRecord(MARKER_IN_TEXT, f"{marker!r} in {place}")


def _tokens(tokenizer: "PreTrainedTokenizerBase", *texts: str | None) -> list[str]:
    """Those of the texts that the tokenizer takes for one token wherever they stand."""
    added = tokenizer.get_added_vocab()
    return [text for text in texts if text and text in added]


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
