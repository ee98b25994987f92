"""The text with which a chat template brackets the assistant's turns, learnt from its output."""

from dataclasses import dataclass
from itertools import takewhile

from megatron_profit.data.chat import thoughts
from megatron_profit.data.chat.messages import Message
from megatron_profit.data.errors import DataError
from megatron_profit.data.render.template import ChatTemplate
from megatron_profit.data.render.token_loss import check_tokens

# No template writes these, and they differ from the first character on.
_ASKED, _ANSWERED, _ASKED_AGAIN, _ANSWERED_AGAIN = "7vAsk7", "8vSay8", "6vQue6", "9vEnd9"


@dataclass(frozen=True, slots=True)
class TurnMarkers:
    r"""The text with which a template brackets the assistant's turns.

    Attributes:
        header: Text right before every assistant turn, e.g. "<|im_start|>assistant\\n".
        prompt: The header and the rest of the generation prompt's end. For example,
            "<|im_start|>assistant\\n<think>\\n" for a template that opens a think block.
        end: Text that ends the turn, e.g. "<|im_end|>"; the model must produce it.
        opening: Token that begins a turn of any role, e.g. "<|im_start|>"; "" if there is none.
        asking: Text between an answer's end and the next question, without spaces around it, e.g. "<|user|>".
        end_id: Id of the first added token in `end`, at which generation has to stop; None where `end` is
            ordinary text only.
    """

    header: str
    prompt: str
    end: str
    opening: str
    asking: str
    end_id: int | None


def learn_markers(template: ChatTemplate) -> TurnMarkers:
    """Return the markers of the template, which has to render two plain questions and answers for it.

    Raises:
        DataError: The template fails, or writes no assistant header or no end of turn, so that the trained
            part is unknown; or the tokenizer drops the text.
    """
    probe = _probe(template)
    check_tokens(template, probe.talk)
    common = _common_tokens(template, probe.after_earlier, probe.after_last)
    if not common.strip():
        raise DataError(
            f"the chat template of {template.name} writes no end of turn after what "
            "the assistant says, so the model would never learn to stop: an earlier answer is "
            f"followed by {probe.after_earlier!r}, the last one by {probe.after_last!r}; "
            "write the same end-of-turn token after both"
        )
    question_end = _question_end(template, probe)
    header = _header(template, probe, question_end)
    asking = probe.after_earlier.removeprefix(common)
    opening = _common_tokens(template, asking, header)
    end = common.rstrip()
    return TurnMarkers(
        header,
        probe.prompt.removeprefix(question_end),
        end,
        # Ordinary text, such as "###", may well stand in an answer; it would not tell turns apart.
        opening if template.added(opening) else "",
        asking.strip(),
        _added_id_after(template, probe.talk, _ANSWERED_AGAIN, end),
    )


@dataclass(frozen=True, slots=True)
class _Probe:
    """A template's output around sentinels, in the places where turns may differ.

    Two questions and answers are rendered. So is the first question alone, without and with the generation
    prompt. `after_question` is the end of the lone question; `prompt` is that end and the generation prompt.
    The other attributes surround the first answer (`earlier`) and the second (`last`) in the whole `talk`.
    """

    after_question: str
    prompt: str
    before_earlier: str
    before_last: str
    after_earlier: str
    after_last: str
    talk: str


def _probe(template: ChatTemplate) -> _Probe:
    question, answer = _said("user", _ASKED), _said("assistant", _ANSWERED)
    again = [_said("user", _ASKED_AGAIN), _said("assistant", _ANSWERED_AGAIN)]
    try:
        plain = template.text([question])
        prompt = template.text([question], prompt=True)
        talk = template.text([question, answer, *again])
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
            f"the chat template of {template.name} cannot render two plain questions "
            f"and answers ({type(error).__name__}: {error}); correct the template"
        ) from error


def _question_end(template: ChatTemplate, probe: _Probe) -> str:
    """Return the end of a question.

    A lone question may end otherwise. For example, Phi-3's template writes the end of the text.
    """
    if probe.prompt.startswith(probe.after_question):
        return probe.after_question
    return _common_tokens(template, probe.after_question, probe.prompt)


def _header(template: ChatTemplate, probe: _Probe, question_end: str) -> str:
    """Return the text shared by the generation prompt and the beginnings of an earlier and the last answer.

    A think block belongs to the turn, not to the header: other answers may be written with another one.
    """
    beginnings = [probe.prompt, probe.before_earlier, probe.before_last]
    if {beginning.strip() for beginning in beginnings} == {question_end.strip()}:
        raise DataError(
            f"the chat template of {template.name} writes no header before what the assistant says: its text "
            f"follows {question_end!r}, the end of a question, as in Mistral's templates. So nothing marks "
            "where an answer begins; use a template that begins each answer with a header of its own"
        )
    bracket = _common_prefix(beginnings)
    header = thoughts.without_tags(bracket.removeprefix(question_end))
    if not header.strip() or not bracket.startswith(question_end):
        raise DataError(
            f"the chat template of {template.name} writes no header before what the "
            "assistant says: a question is followed by "
            f"{', '.join(map(repr, beginnings))} in the generation prompt, before an earlier "
            "answer and before the last; write the same header in all three"
        )
    return header


def _common_tokens(template: ChatTemplate, first: str, second: str) -> str:
    """Return the text of the leading tokens that two texts share (characters could cut a token)."""
    encoding, other = template.encode([first, second])
    pairs = zip(encoding.ids, other.ids, strict=False)
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return first[: encoding.offsets[shared - 1][1]] if shared else ""


def _added_id_after(template: ChatTemplate, text: str, sentinel: str, end: str) -> int | None:
    """Return the id of the first added token in the `end` that follows the sentinel, or None."""
    begin = text.index(sentinel) + len(sentinel)
    limit = text.index(end, begin) + len(end)
    (encoding,) = template.encode([text])
    added = set(template.tokenizer.get_added_vocab().values())
    inside = (
        token
        for token, (first, last) in zip(encoding.ids, encoding.offsets, strict=True)
        if begin <= first and last <= limit and token in added
    )
    return next(inside, None)


def _common_prefix(texts: list[str]) -> str:
    columns = enumerate(zip(*texts, strict=False))
    length = next((i for i, column in columns if len(set(column)) > 1), min(map(len, texts)))
    return texts[0][:length]


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
