"""Tokens that only a chat template writes: in a record's text they would be obeyed rather than read."""

import re
from collections.abc import Iterable, Sequence

from megatron_profit.data.chat import thoughts
from megatron_profit.data.chat.conversations import Conversation
from megatron_profit.data.errors import BrokenRecord, DataError
from megatron_profit.data.files.fields import strings
from megatron_profit.data.render.template import ChatTemplate
from megatron_profit.data.render.turn_markers import TurnMarkers
from megatron_profit.data.report import Finding

MARKER_IN_TEXT = "a text holds the chat template's own turn markers"
SPECIAL_IN_TEXT = "a text holds a special token of the tokenizer"
# A finding, see `Finding`.
UNMARKED_IN_TEXT = "control tokens in a text that the tokenizer does not mark as special"

_LOOKS_LIKE_CONTROL = re.compile(r"<[|\uff5c].+[|\uff5c]>", re.DOTALL)


class ControlTokens:
    """Finds control tokens in the texts of a record."""

    def __init__(
        self, template: ChatTemplate, markers: TurnMarkers, allowed: Sequence[str] = ()
    ) -> None:
        """Collect the tokens.

        Args:
            template: The tokenizer and its template.
            markers: The template's markers.
            allowed: Special tokens that texts may hold, as tokens.

        Raises:
            DataError: One of `allowed` is no special token, or a marker.
        """
        special = _special(template)
        for token in allowed:
            _check_allowed(token, special, template, markers)
        # Ordinary text that ends a turn may well stand in a question; a token would end it there.
        brackets = template.added(markers.opening, markers.end, markers.asking)
        self._inside = _any_of([markers.header, *brackets])
        self._said = _any_of({markers.end} - set(brackets))
        self._special = _any_of(special - set(allowed))
        self._unmarked = _any_of(_unmarked(template) - special)

    def check(self, conversation: Conversation) -> Finding:
        """Return whether the texts hold tokens that look like control tokens, but are not special.

        Raises:
            BrokenRecord: The texts hold markers or special tokens.
        """
        texts = _joined([conversation.messages, conversation.tools])
        _refuse(self._inside, texts, MARKER_IN_TEXT)
        _refuse(self._special, texts, SPECIAL_IN_TEXT)
        if self._said:
            _refuse(self._said, _joined(conversation.assistant_messages), MARKER_IN_TEXT)
        found = self._unmarked and self._unmarked.search(texts)
        return Finding(1, detail=repr(found[0])) if found else Finding(0)


def _special(template: ChatTemplate) -> set[str]:
    """Return the special tokens, as the tokenizer marks them, without the tags of thoughts.

    These may stand in an answer.
    """
    tokenizer = template.tokenizer
    marked = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = template.added(tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    return marked.union(named) - {thoughts.OPEN, thoughts.CLOSE}


def _unmarked(template: ChatTemplate) -> set[str]:
    """Return added tokens that look like control tokens and that the template does not write.

    For example, Qwen3's <|fim_prefix|> is such a token.
    """
    source = str(template.tokenizer.chat_template)
    added = template.tokenizer.get_added_vocab()
    return {
        token for token in added if _LOOKS_LIKE_CONTROL.fullmatch(token) and token not in source
    }


def _check_allowed(
    token: str, special: set[str], template: ChatTemplate, markers: TurnMarkers
) -> None:
    if token not in special:
        raise DataError(
            f"--allow-special-tokens {token}: no special token of {template.name}; these are "
            f"{', '.join(sorted(special)) or 'none'}"
        )
    if token in (markers.opening, markers.end, markers.asking):
        raise DataError(
            f"--allow-special-tokens {token}: the chat template of {template.name} begins or ends turns "
            "with this token, so that a text with it would be cut there"
        )


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    alternatives = "|".join(map(re.escape, sorted(texts)))
    return re.compile(alternatives) if alternatives else None


def _joined(value: object) -> str:
    """Return all strings in `value`, joined by a character that no marker holds."""
    return "\0".join(strings(value))


def _refuse(pattern: re.Pattern[str] | None, text: str, reason: str) -> None:
    if pattern and (found := pattern.search(text)):
        raise BrokenRecord(reason, repr(found[0]))
