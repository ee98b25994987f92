"""The day that a chat template writes: the day that was asked for, not the day of the preparation.

Templates such as Llama 3.2's and gpt-oss's call `strftime_now`. If the clock answered, the ids of a record
would depend on the time of its preparation. For example, the same data would differ if they were prepared on
two days, or on two machines around midnight.
"""

import re
from datetime import date, datetime, time
from functools import cache
from typing import TYPE_CHECKING

from megatron_profit.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLOCK = "strftime_now"
# A call with its format written out, as all known templates have it: the quote and the format.
_CALL = re.compile(rf"""{_CLOCK}\(\s*(["'])((?:(?!\1).)*)\1\s*\)""")


def parse_day(text: str | None) -> date | None:
    """Return the day of --template-date, for example 2025-01-31; None without one.

    Raises:
        DataError: The text is no day.
    """
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError as error:
        raise DataError(f"--template-date {text} is no day ({error}); write YYYY-MM-DD") from error


def writes_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a chat template of the tokenizer asks for today's date."""
    return any(_CLOCK in template for template in _templates(tokenizer))


def _templates(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    found = tokenizer.chat_template
    return list(found.values()) if isinstance(found, dict) else [str(found)]


def check_day(tokenizer: "PreTrainedTokenizerBase", day: date | None, name: str) -> None:
    """Require a day where a template of the tokenizer writes one, and refuse it elsewhere.

    Args:
        tokenizer: A tokenizer with chat templates.
        day: The day that was asked for.
        name: The tokenizer's name in messages.

    Raises:
        DataError: The day is missing, would be ignored, or cannot be put into the template.
    """
    asks = writes_date(tokenizer)
    if asks and day is None:
        raise DataError(
            f"the chat template of {name} writes today's date, so the same record would be other tokens "
            f"tomorrow; fix the day with --template-date, e.g. --template-date {date.today()}"
        )
    if day is not None and not asks:
        raise DataError(
            f"--template-date {day} is given, but the chat template of {name} writes no date; drop it"
        )
    if day is not None:
        for template in _templates(tokenizer):
            if f"{_CLOCK}(" in with_day(template, day):
                raise DataError(
                    f"the chat template of {name} does not write out the format that it gives to "
                    f"{_CLOCK}, so no day can be put into it; write it out, as in {_CLOCK}('%d %b %Y')"
                )


@cache
def with_day(template: str, day: date) -> str:
    """Return the template with the day in place of its calls of the clock."""
    moment = datetime.combine(day, time())
    return _CALL.sub(lambda call: f"{call[1]}{moment.strftime(call[2])}{call[1]}", template)
