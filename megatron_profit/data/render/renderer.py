"""Conversations -> token ids and the mask of the tokens that the model must produce.

A conversation is rendered once, whole, with the tokenizer's own chat template, and tokenised once. Templates
such as Qwen3's write an assistant turn differently according to its place. So rendering message by message
would give a text that the model never sees at inference. The supervised part is then found by character
position: from the end of the generation prompt up to and including the end of the turn. The markers of a turn
are learnt from the template itself. Positions, never token values, decide the mask: where pad and end-of-turn
are one token, the end is still trained.

Shape suffix: T tokens of one conversation.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_profit.data.chat import thoughts
from megatron_profit.data.chat.conversations import Conversation
from megatron_profit.data.chat.messages import Message
from megatron_profit.data.errors import BrokenRecord, shown
from megatron_profit.data.render.control_tokens import UNMARKED_IN_TEXT, ControlTokens
from megatron_profit.data.render.left_out import (
    check_answer,
    leaves_out_context,
    tagged_twice,
)
from megatron_profit.data.render.template import ChatTemplate
from megatron_profit.data.render.token_loss import uncovered, unknown_id
from megatron_profit.data.render.token_offsets import TokenOffsets
from megatron_profit.data.render.turn_markers import learn_markers
from megatron_profit.data.report import Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FAILED = "the chat template refuses the conversation"
TURNS_NOT_FOUND = "the rendered text does not show each assistant turn once"
UNKNOWN_TRAINED = "the tokenizer has no token for a part of an answer"

# Findings in records that are used, see `Finding`.
REASONING_LEFT_OUT = "reasoning that the chat template leaves out"
NOT_AS_PROMPTED = "answers that do not begin as the generation prompt ends"
NEVER_AS_PROMPTED = (
    "context of inference that is never trained: no answer begins as the prompt ends"
)
ENDS_BEFORE_ANSWER = "answers that end a turn although the next message is an answer again"
TAGGED_TWICE = "tool results that hold the tags which the chat template writes around them"
CONTEXT_LEFT_OUT = "messages or tools before the answer that the chat template leaves out"
TEXT_DROPPED = "text that the tokenizer drops or has no token for"

# Turns of one conversation whose generation prompts are rendered: each is as long as the messages before it.
_PROMPTS = 64


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """Token ids of a conversation.

    Attributes:
        ids: [T] int32.
        supervised: [T] bool, true where the model must produce this token.
        findings: Findings that the preparation counts.
    """

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    findings: Mapping[str, Finding] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SupervisionPolicy:
    """The parts of the assistant's turns that are trained.

    Attributes:
        turns: "all", or only the "last"; or "each", of which each is the last turn of an example of its own.
        think: Whether <think> blocks are trained too; else a turn is trained from their end on.
    """

    turns: Literal["all", "last", "each"] = "all"
    think: bool = True

    def __post_init__(self) -> None:
        if self.turns not in ("all", "last", "each"):
            raise ValueError(f"turns is {self.turns!r}; it must be all, last or each")

    def examples(self, conversation: Conversation) -> list[Conversation]:
        """Return the conversations to render for a record: with `each` one up to each trained turn."""
        if self.turns != "each":
            return [conversation]
        answers = conversation.positions
        return [
            replace(
                conversation,
                messages=conversation.messages[: last + 1],
                untrained=frozenset(answers) - {last},
                goes_on=last + 1 in answers,
            )
            for last in answers
            if last not in conversation.untrained
        ]


@dataclass(frozen=True, slots=True)
class _Turn:
    """A trained turn of the rendered text.

    Attributes:
        position: Position of its message.
        header, begin, end: Characters at which its header begins, its header ends, and the turn ends.
    """

    position: int
    header: int
    begin: int
    end: int


@dataclass(slots=True)
class _Draft:
    """A conversation as text, before it is tokenised; `prompts` are the generation prompts of its turns."""

    conversation: Conversation
    text: str
    turns: list[_Turn]
    findings: dict[str, Finding]
    prompts: list[str] = field(default_factory=list)


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template and marks the assistant's tokens.

    Attributes:
        markers: The turn markers, learnt from the template.
        training: The parts of the assistant's turns that are marked.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        training: SupervisionPolicy | None = None,
        day: date | None = None,
        allowed_tokens: Sequence[str] = (),
    ) -> None:
        """Learn the turn markers of the tokenizer's template.

        Args:
            tokenizer: A fast tokenizer (one that knows character offsets) with a chat template.
            training: The parts of the assistant's turns that are trained; all of them by default.
            day: The day for a template that writes today's date; None for other templates.
            allowed_tokens: Special tokens that texts of records may hold, as tokens.

        Raises:
            DataError: The tokenizer is not fast, has no template, or drops text. Or the template writes no
                assistant header or no end of turn, so that the trained part is unknown. Or the template
                writes a date and `day` is None, or the other way round. Or one of `allowed_tokens` is no
                special token, or a marker of the template.
        """
        self.template = ChatTemplate(tokenizer, day)
        self.training = training or SupervisionPolicy()
        self.markers = learn_markers(self.template)
        self._unknown = unknown_id(self.template)
        self._unknown_token = (
            "" if self._unknown is None else tokenizer.convert_ids_to_tokens(self._unknown)
        )
        self._control = ControlTokens(self.template, self.markers, allowed_tokens)

    def render(self, conversation: Conversation) -> RenderedConversation:
        """Return the token ids and supervised mask of a conversation.

        The ids equal `tokenizer.apply_chat_template(messages, tools=tools)`, on the day that was
        given where the template writes one. A token is supervised if it begins inside an assistant turn,
        after the generation prompt; one that begins in the prompt and reaches into the
        turn is not, since at generation its beginning is already written.

        Raises:
            BrokenRecord: The template refuses the conversation, or the turns in the text are
                ambiguous.
        """
        (result,) = self.render_all([conversation])
        if isinstance(result, BrokenRecord):
            raise result
        return result

    def render_all(
        self, conversations: Sequence[Conversation]
    ) -> list[RenderedConversation | BrokenRecord]:
        """Return `render` of several conversations, tokenised together; errors are returned, not raised."""
        results = [_caught(self._draft, conversation) for conversation in conversations]
        drafts = [result for result in results if isinstance(result, _Draft)]
        self._add_prompts(drafts)
        encodings = self.template.encode([draft.text for draft in drafts])
        marked = iter(
            [_caught(self._marked, *pair) for pair in zip(drafts, encodings, strict=True)]
        )
        return [next(marked) if isinstance(result, _Draft) else result for result in results]

    def text(self, conversation: Conversation) -> str:
        """Return the whole conversation as the template writes it.

        Raises:
            BrokenRecord: The template refuses the conversation.
        """
        try:
            return self.template.text(conversation.messages, conversation.tools)
        except Exception as error:  # a template is a program: it may fail in any way on odd data
            raise BrokenRecord(
                TEMPLATE_FAILED, f"{type(error).__name__}: {shown(str(error))}"
            ) from error

    def _draft(self, conversation: Conversation) -> _Draft:
        """Return the text and its trained turns, compared with the record.

        Raises:
            BrokenRecord: As in `render`.
        """
        control = self._control.check(conversation)
        text = self.text(conversation)
        turns = [
            turn for turn in self._turns(text, conversation) if self._trains(turn, conversation)
        ]
        reasoning = []
        for turn in turns:
            said = text[turn.begin : turn.end - len(self.markers.end)]
            reasoning.append(check_answer(conversation.messages[turn.position], said))
        dropped, kept = reasoning.count(False), reasoning.count(True)
        trained = {turn.position for turn in turns}
        lost = leaves_out_context(conversation, text, trained)
        ends = {position - 1 for position in conversation.positions}
        if conversation.goes_on:
            ends.add(len(conversation.messages) - 1)
        early = len(ends & trained)
        findings = {
            ENDS_BEFORE_ANSWER: Finding(early, len(turns), "trained turns"),
            REASONING_LEFT_OUT: Finding(dropped, dropped + kept, "turns with reasoning"),
            CONTEXT_LEFT_OUT: Finding(int(lost)),
            TAGGED_TWICE: Finding(int(tagged_twice(conversation, text))),
            UNMARKED_IN_TEXT: control,
        }
        return _Draft(conversation, text, turns, findings)

    def _turns(self, text: str, conversation: Conversation) -> list[_Turn]:
        """Return the assistant's turns, in order.

        Raises:
            BrokenRecord: There are not as many turns as assistant messages.
        """
        headers = list(re.finditer(re.escape(self.markers.header), text))
        positions = conversation.positions
        if len(headers) != len(positions):
            raise BrokenRecord(
                TURNS_NOT_FOUND,
                f"{len(positions)} assistant messages, {len(headers)} turns in {shown(text)}",
            )
        limits = [header.start() for header in headers[1:]] + [len(text)]
        return [
            _Turn(position, header.start(), header.end(), self._end(text, header.end(), limit))
            for position, header, limit in zip(positions, headers, limits, strict=True)
        ]

    def _end(self, text: str, begin: int, limit: int) -> int:
        """Return the end of the turn from `begin`, before `limit` and before any other turn begins."""
        end = text.find(self.markers.end, begin, limit)
        turn = text[begin:end]
        if end < 0 or (self.markers.opening and self.markers.opening in turn):
            raise BrokenRecord(
                TURNS_NOT_FOUND, f"no {self.markers.end!r} ends the turn {shown(text[begin:limit])}"
            )
        return end + len(self.markers.end)

    def _trains(self, turn: _Turn, conversation: Conversation) -> bool:
        last = self.training.turns == "all" or turn.position == conversation.positions[-1]
        return last and turn.position not in conversation.untrained

    def _add_prompts(self, drafts: Sequence[_Draft]) -> None:
        """Give each draft the generation prompts of its turns."""
        for _, group in groupby(drafts, key=lambda draft: draft.conversation.tools):
            together = list(group)
            tools = together[0].conversation.tools
            pasts = [past for draft in together for past in _pasts(draft)]
            prompts = iter(self._prompts(pasts, tools))
            for draft in together:
                found = [next(prompts) for _ in _pasts(draft)]
                draft.prompts = found + found[-1:] * (len(draft.turns) - len(found))

    def _prompts(self, pasts: list[list[Message]], tools: list[dict[str, Any]] | None) -> list[str]:
        """Return the generation prompts after these messages, from the assistant's header on."""
        try:
            texts = self.template.texts(pasts, tools, prompt=True) if pasts else []
        except Exception:  # on one of them, perhaps for lack of any message
            if len(pasts) == 1:
                return [self.markers.prompt]
            return [prompt for past in pasts for prompt in self._prompts([past], tools)]
        return [self._prompt_in(text) for text in texts]

    def _prompt_in(self, text: str) -> str:
        """Return the end of a text from the last header on; the usual prompt if that end is a whole turn."""
        header, end, prompt = self.markers.header, self.markers.end, self.markers.prompt
        found = text[text.rfind(header) :] if header in text else prompt
        return prompt if end in found else found

    def _marked(self, draft: _Draft, encoding: Any) -> RenderedConversation:
        """Return the ids of a draft, supervised where a token begins inside one of the turns.

        Raises:
            BrokenRecord: The token for unknown text would be trained.
        """
        tokens = TokenOffsets(encoding)
        supervised_T = np.zeros(len(tokens.ids), dtype=np.bool_)
        astray = []
        for turn, prompt in zip(draft.turns, draft.prompts, strict=True):
            prompted = draft.text.startswith(prompt, turn.header)
            begin = turn.header + len(prompt) if prompted else turn.begin
            if not prompted or tokens.straddle(begin):
                astray.append(prompt)
            if not self.training.think:
                opening = prompt if prompted else self.markers.header
                begin = _after_thoughts(draft.text, begin, turn.end, opening)
            supervised_T[tokens.within(begin, turn.end)] = True
        never = 0 < len(draft.turns) == len(astray)
        detail = f"the prompt ends in {shown(astray[0])}" if astray else ""
        remedy = _remedy(astray, draft.findings[REASONING_LEFT_OUT].count > 0)
        findings = {
            NOT_AS_PROMPTED: Finding(len(astray), len(draft.turns), "trained turns", detail),
            NEVER_AS_PROMPTED: Finding(int(never), detail=f"{detail}; {remedy}"),
            TEXT_DROPPED: self._dropped(draft.text, tokens, supervised_T),
        }
        return RenderedConversation(tokens.ids, supervised_T, draft.findings | findings)

    def _dropped(
        self, text: str, tokens: TokenOffsets, supervised_T: npt.NDArray[np.bool_]
    ) -> Finding:
        """Return the finding of text without a token of its own.

        Raises:
            BrokenRecord: The token for unknown text would be trained.
        """
        missing = [uncovered(text, tokens.offsets)]
        unknown = -1 if self._unknown is None else self._unknown
        for i in np.flatnonzero(tokens.ids == unknown):
            piece = text[slice(*tokens.offsets[i])].strip()
            if piece == self._unknown_token:  # the template writes it
                continue
            if supervised_T[i]:
                raise BrokenRecord(UNKNOWN_TRAINED, shown(piece))
            missing.append(piece)
        return Finding(int(any(missing)), detail=shown("".join(missing)))


def _caught[**P, T](
    function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T | BrokenRecord:
    try:
        return function(*args, **kwargs)
    except BrokenRecord as error:
        return error


def _pasts(draft: _Draft) -> list[list[Message]]:
    """Return the messages before each turn, for the first turns, whose prompts are rendered."""
    return [draft.conversation.messages[: turn.position] for turn in draft.turns[:_PROMPTS]]


def _after_thoughts(text: str, begin: int, end: int, opening: str) -> int:
    """Return where the turn [begin, end) goes on after its think block; `begin` if it has none.

    The block begins the turn, or the text before it, `opening`, has opened it already. An answer may mention
    the tags, and may begin with spaces, which belong to it.
    """
    opened = opening.rfind(thoughts.OPEN) > opening.rfind(thoughts.CLOSE)
    close = text.find(thoughts.CLOSE, begin, end)
    if close < 0 or not (opened or text[begin:end].lstrip().startswith(thoughts.OPEN)):
        return begin
    rest = text[close + len(thoughts.CLOSE) : end]
    return end - len(rest.lstrip("\r\n"))


def _remedy(prompts: Sequence[str], dropped: bool) -> str:
    """Return the remedy for answers that do not begin as these prompts end.

    Args:
        prompts: The generation prompts of the answers.
        dropped: Whether the template leaves out thoughts of the record.
    """
    if any(thoughts.OPEN in prompt for prompt in prompts):
        if dropped:
            return (
                "the chat template leaves out their thoughts: give --train-on each, or, for a template "
                "that never writes thoughts, another one"
            )
        return "give the answers reasoning_content, or use a chat template whose prompt opens no think block"
    return (
        "a token of the answer begins in the prompt: end the template's prompt where a token ends"
    )
