"""Rows of a CSV file with a header. An empty cell is an absent field; other cells are text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from megatron_profit.data.errors import BrokenRecord, DataError, shown
from megatron_profit.data.files.bounded import LARGEST_RECORD, open_data
from megatron_profit.data.files.json_text import decoded

OTHER_CELLS = "a row has another number of cells than the header"


def csv_rows(path: Path) -> Iterator[tuple[dict[str, str] | BrokenRecord, int]]:
    """Yield the rows of a file by the names in its header, each with its size in characters.

    Raises:
        DataError: The file is not UTF-8, its quotes do not match, a cell is too large, or its header has an
            empty name or one name twice.
    """
    csv.field_size_limit(LARGEST_RECORD)
    with open_data(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        rows = csv.reader(lines, strict=True)
        try:
            header = next(rows, [])
            _check(header, path)
            for cells in rows:
                if cells:
                    yield _row(header, cells), sum(map(len, cells))
        except csv.Error as error:
            raise DataError(
                f"{path}, line {rows.line_num}: not a CSV file with commas and double quotes ({error}); "
                "correct the row, or write the data as .jsonl"
            ) from error
        except UnicodeDecodeError as error:
            decoded(error.object[error.start :], f"{path}, after line {rows.line_num}")
            raise


def _check(header: list[str], path: Path) -> None:
    names = [name for name in header if name]
    if len(names) < len(header) or len(set(names)) < len(names):
        raise DataError(
            f"{path}: the first row must name each column once, found {shown(header)}; correct it"
        )


def _row(header: list[str], cells: list[str]) -> dict[str, str] | BrokenRecord:
    if len(cells) != len(header):
        return BrokenRecord(OTHER_CELLS, f"{len(cells)} cells, the header has {len(header)}")
    return {name: cell for name, cell in zip(header, cells, strict=True) if cell}
