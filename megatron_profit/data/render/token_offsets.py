"""The relation of tokens to the characters of a text.

Shape suffix: T tokens of one text.
"""

from bisect import bisect_left
from typing import Any

import numpy as np


class TokenOffsets:
    """The tokens of a text and the characters that they stand for.

    Attributes:
        ids: [T] int32.
        offsets: The characters [begin, end) of each token.
    """

    def __init__(self, encoding: Any) -> None:
        """Take the ids and offsets of a `tokenizers.Encoding`."""
        self.ids = np.asarray(encoding.ids, dtype=np.int32)
        self.offsets: list[tuple[int, int]] = encoding.offsets
        self._begins = [begin for begin, _ in self.offsets]

    def within(self, begin: int, end: int) -> slice:
        """Return the tokens that begin inside the characters [begin, end)."""
        return slice(self._first(begin), bisect_left(self._begins, end))

    def straddle(self, character: int) -> bool:
        """Return whether a token begins before this character and goes on after it."""
        first = self._first(character)
        return first > 0 and self.offsets[first - 1][1] > character

    def _first(self, character: int) -> int:
        """Return the first token that begins at this character or after it."""
        first = bisect_left(self._begins, character)
        # Some tokenizers trim spaces from the offsets, so a token of spaces has an empty range at its end. It
        # began where the token before it ends.
        while first < len(self.offsets) and self._began_before(first, character):
            first += 1
        return first

    def _began_before(self, token: int, character: int) -> bool:
        begin, end = self.offsets[token]
        before = self.offsets[token - 1][1] if token else 0
        return begin == end and (begin == character or before < character)
