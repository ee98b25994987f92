"""Rows of a CSV file with a header. An empty cell is a null; other cells are text."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_profit.data.errors import BrokenRecord, DataError, shown
from megatron_profit.data.files.bounded import (
    LARGEST_RECORD,
    bounded_lines_of_any_end,
    open_data,
)
from megatron_profit.data.files.json_text import decoded

OTHER_CELLS = "a row has another number of cells than the header"


def csv_rows(path: Path) -> Iterator[tuple[dict[str, str | None] | BrokenRecord, int]]:
    """Yield the rows of a file by the names in its header, each with its size in characters.

    Raises:
        DataError: The file is not UTF-8, its quotes do not match, a row is too large, or its header has an
            empty name or one name twice.
    """
    csv.field_size_limit(LARGEST_RECORD)
    with open_data(path) as file:
        lines = _Lines(file, path)
        rows = csv.reader(lines, strict=True)
        try:
            header = next(rows, [])
            _check(header, path)
            for cells in rows:
                lines.begin_row()
                if cells:
                    yield _row(header, cells), sum(map(len, cells))
        except csv.Error as error:
            raise DataError(
                f"{path}, line {rows.line_num}: not a CSV file with commas and double quotes ({error}); "
                "correct the row, or write the data as .jsonl"
            ) from error


class _Lines:
    """The lines of a file as text with their ends, none longer than a record may be.

    Raises:
        DataError: The file is not UTF-8, or the lines of a row are too large together.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._row_bytes = 0

    def begin_row(self) -> None:
        """Count the next lines as another row's."""
        self._row_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(bounded_lines_of_any_end(self._file), 1):
            where = f"{self._path}, line {number}"
            self._row_bytes += len(line)
            if self._row_bytes > LARGEST_RECORD:
                raise DataError(
                    f"{where}: its row has more than {LARGEST_RECORD:,} bytes; correct the quotes, or split "
                    "the row"
                )
            yield decoded(line, where, is_start=number == 1)


def _check(header: list[str], path: Path) -> None:
    names = [name for name in header if name]
    if len(names) < len(header) or len(set(names)) < len(names):
        is_index = names == header[1:]
        remedy = (
            "write it without the index, in pandas with index=False" if is_index else "correct it"
        )
        raise DataError(
            f"{path}: the first row must name each column once, found {shown(header)}; {remedy}"
        )


def _row(header: list[str], cells: list[str]) -> dict[str, str | None] | BrokenRecord:
    if len(cells) != len(header):
        return BrokenRecord(OTHER_CELLS, f"{len(cells)} cells, the header has {len(header)}")
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}
