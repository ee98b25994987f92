"""JSON from a file that need not fit into memory: a list is read one item at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from megatron_profit.data.errors import DataError, shown
from megatron_profit.data.files.bounded import BLOCK, LARGEST_RECORD

_NOT_SPACE = re.compile(r"[^ \t\n\r]")
# Formats that a file which is not UTF-8 may have, by its first bytes, and the remedy.
_BEGINNINGS = {
    codecs.BOM_UTF16_LE: "convert the file, e.g. with iconv -f utf-16 -t utf-8",
    codecs.BOM_UTF16_BE: "convert the file, e.g. with iconv -f utf-16 -t utf-8",
    b"\x1f\x8b": "it is packed with gzip: end its name in .gz",
    b"\x28\xb5\x2f\xfd": "it is packed with zstd: end its name in .zst",
    b"PAR1": "it is a parquet file: end its name in .parquet",
    b"PK\x03\x04": "it is a zip archive: unpack it",
}
# Characters of a token that may be cut off: two escaped surrogates. A number that is cut off before its
# exponent reads as a shorter number.
_LONGEST_TOKEN = 12


def broken_json(path: str | Path, line: int, column: int, message: str, rest: str) -> DataError:
    """Return the error for a text that is not JSON from a place on; `rest` is the text at that place."""
    found = shown(rest) if rest.strip() else "the end of the text"
    return DataError(
        f"{path}, line {line}, column {column}: not valid JSON ({message}), found {found}; "
        "correct it or remove the record"
    )


def decoded(data: bytes, where: str, *, is_start: bool = True) -> str:
    """Return UTF-8 as text, without a byte order mark at the start of a file.

    Args:
        data: The bytes.
        where: Their place, for the error.
        is_start: Whether a mark may stand first; elsewhere U+FEFF is a character of the text.

    Raises:
        DataError: It is in another encoding; a `UnicodeDecodeError` is its cause.
    """
    try:
        return data.decode("utf-8-sig" if is_start else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(where, data, error.start) from error


def _not_utf8(where: str, data: bytes, place: int, before: int = 0) -> DataError:
    """Return the error for a byte of `data`, which follows `before` other bytes."""
    known = (remedy for begin, remedy in _BEGINNINGS.items() if data.startswith(begin))
    remedy = next(known, "convert the file, e.g. with iconv -t utf-8")
    return DataError(f"{where}: not UTF-8 (byte {data[place]:#04x} at {before + place}); {remedy}")


class JsonText:
    """The text of a file; only the part that is being read is in memory."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0
        # The number of the first character of the text in memory.
        self._line, self._column = 1, 1
        # Bytes that were read so far.
        self._end = 0

    def next_character(self) -> str:
        """Go to the next character that is no space, and return it; "" at the end of the file."""
        while True:
            if found := _NOT_SPACE.search(self._text, self._at):
                self._at = found.start()
                return found[0]
            self._at = len(self._text)
            if not self._read_on():
                return ""

    def items[Item](
        self, decode: Callable[[str, int], tuple[Item, int]]
    ) -> Iterator[tuple[Item, int]]:
        """Yield the items of the list that begins at the next character, each with its number of characters.

        Args:
            decode: Makes an item of a text from a place on, and returns the place of its end too.

        Raises:
            DataError: The text is not JSON, or an item is longer than a record may be.
        """
        self._take("[")
        if self.next_character() == "]":
            self._at += 1
        else:
            yield self._item(decode)
            while self.next_character() != "]":
                self._take(",")
                self.next_character()
                yield self._item(decode)
            self._at += 1
        if self.next_character():
            raise self._broken("Extra data", self._at)

    def _take(self, character: str) -> None:
        if self.next_character() != character:
            raise self._broken(f"Expecting {character!r}", self._at)
        self._at += 1

    def _item[Item](self, decode: Callable[[str, int], tuple[Item, int]]) -> tuple[Item, int]:
        at_end = False
        while True:
            try:
                item, end = decode(self._text, self._at)
                size = end - self._at
                if size <= LARGEST_RECORD and (at_end or not self._is_near_end(end)):
                    self._at = end
                    return item, size
            except json.JSONDecodeError as error:
                if at_end or not self._may_go_on(error):
                    raise self._broken(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:  # thousands of digits, endless nesting
                raise self._unreadable(str(error)) from error
            if len(self._text) - self._at > LARGEST_RECORD:
                raise self._unreadable(f"it does not end within {LARGEST_RECORD:,} characters")
            at_end = not self._read_on()

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Return whether the text may be valid if more of the file is read."""
        return self._is_near_end(error.pos) or error.msg.startswith("Unterminated string")

    def _is_near_end(self, at: int) -> bool:
        """Return whether unread text may change the value here.

        For example, `e9` changes the number before it.
        """
        return at >= len(self._text) - _LONGEST_TOKEN

    def _read_on(self) -> bool:
        """Drop the text that was parsed, and read as much again as is left, at least a block.

        Returns:
            False at the end of the file.
        """
        self._line, self._column = self._place(self._at)
        self._text, self._at = self._text[self._at :], 0
        data = self._file.read(max(BLOCK, len(self._text)))
        self._end += len(data)
        held = self._decoder.getstate()[0] + data
        try:
            self._text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise _not_utf8(str(self._path), held, error.start, self._end - len(held)) from error
        return bool(data)

    def _place(self, at: int) -> tuple[int, int]:
        """Return the line and column of a place in the text that is held."""
        lines = self._text.count("\n", 0, at)
        begin = self._text.rfind("\n", 0, at)
        return self._line + lines, at - begin if lines else self._column + at

    def _broken(self, message: str, at: int) -> DataError:
        return broken_json(self._path, *self._place(at), message, self._text[at : at + 1000])

    def _unreadable(self, why: str) -> DataError:
        line, _ = self._place(self._at)
        return DataError(
            f"{self._path}, line {line}: JSON that cannot be read ({why}); remove the record"
        )
