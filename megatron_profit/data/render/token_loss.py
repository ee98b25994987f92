"""Text that a tokenizer drops: characters that no token stands for, or only the token for unknown text."""

import json
from collections.abc import Sequence
from operator import gt
from typing import Any
from unicodedata import category

from tokenizers.models import Unigram

from megatron_profit.data.errors import DataError, shown
from megatron_profit.data.render.template import ChatTemplate


def check_tokens(template: ChatTemplate, text: str) -> None:
    """Refuse a tokenizer that drops plain text.

    Args:
        template: The tokenizer.
        text: Its template's text around Latin letters and digits.

    Raises:
        DataError: Characters of the text are in no token, or all of it besides added tokens is unknown.
    """
    (encoding,) = template.encode([text])
    known = set(encoding.ids) - set(template.tokenizer.get_added_vocab().values())
    missing = uncovered(text, encoding.offsets)
    if missing or not known - {unknown_id(template)}:
        raise DataError(
            f"{template.name} drops text: of {shown(text)} it knows "
            f"{f'no token for {shown(missing)}' if missing else 'no token'}; its vocabulary has "
            f"{template.tokenizer.vocab_size:,} tokens, so its files may be incomplete. Copy tokenizer.json "
            "from the model's folder again"
        )


def uncovered(text: str, offsets: Sequence[tuple[int, int]]) -> str:
    """Return the characters of the text that no token covers.

    Spaces do not count, because some tokenizers trim them from the offsets. Nor do marks that a tokenizer
    composes with the letter before them: the token then has the letter's offsets alone.

    Args:
        text: The text that was tokenised.
        offsets: The characters [begin, end) of each token, in order. A model without a token for unknown text
            drops a character, and the offsets go on as if it had not been there. So the right number of
            characters is missing, but they are the last ones between two spaces or added tokens.
    """
    begins = [begin for begin, _ in offsets] + [len(text)]
    ends = [0] + [end for _, end in offsets]
    if not any(map(gt, begins, ends)):
        return ""
    gaps = (text[end:begin] for begin, end in zip(begins, ends, strict=True) if begin > end)
    return "".join(c for gap in gaps for c in gap if not c.isspace() and not _composes(c))


def _composes(character: str) -> bool:
    """Return whether a character may combine with the one before: a mark, or a later letter of Hangul."""
    return category(character).startswith("M") or "\u1161" <= character <= "\u11c2"


def unknown_id(template: ChatTemplate) -> int | None:
    """Return the id that the tokenizer's model gives to text that it does not know, None without one."""
    model: Any = template.tokenizer.backend_tokenizer.model
    token = getattr(model, "unk_token", None) or template.tokenizer.unk_token
    if token is None and isinstance(model, Unigram):  # which tells it in its saved form alone
        return json.loads(model.__getstate__()).get("unk_id")  # type: ignore[no-any-return]
    return template.tokenizer.get_vocab().get(token)
