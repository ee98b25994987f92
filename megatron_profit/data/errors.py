"""The two ways data can be wrong: the whole preparation stops (`DataError`), or one record is left out (`BrokenRecord`)."""


class DataError(ValueError):
    """The data or the tokenizer cannot be used; the message names the file, the finding and the remedy."""


class BrokenRecord(ValueError):
    """One record cannot be used. Preparation catches it, leaves the record out and counts it.

    Attributes:
        reason: A fixed phrase under which such records are counted.
        detail: What was found in this record.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def shown(value: object, limit: int = 60) -> str:
    """`value` as it appears in a message: its repr, cut to `limit` characters."""
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."
