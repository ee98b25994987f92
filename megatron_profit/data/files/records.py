"""Reads data files into raw records that remember their place.

This module understands only the container: JSON list, JSON lines, CSV, compressed or not, parquet, a folder
of the `datasets` library. data/chat/conversations.py decides what a record means. A line that is no record is
passed on as broken, to be counted. A damaged container stops the reading: a file that ends in the middle must
not become a shorter data set.
"""

import codecs
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatron_profit.data.errors import BrokenRecord, DataError, shown
from megatron_profit.data.files.bounded import LARGEST_RECORD, bounded_lines, open_data
from megatron_profit.data.files.csv_rows import csv_rows
from megatron_profit.data.files.fields import NAMED_TWICE, most_common, without_nulls
from megatron_profit.data.files.json_text import JsonText, broken_json, decoded
from megatron_profit.data.files.splits import (
    Split,
    check_whole,
    choose_split,
    data_files,
    entry_of,
    is_plain_name,
    saved_splits,
    suffix_of,
    unreadable,
)

NOT_JSON = "a line is not JSON"
NOT_UTF8 = "a line is not UTF-8"
ROW_NOT_UTF8 = "a text of the record is not UTF-8"
NOT_HELD = "a value of the record cannot be read"
TOO_LARGE = f"a record has more than {LARGEST_RECORD:,} bytes"
NOT_AN_OBJECT = "a record is not an object with named fields"
TOO_DEEP = "a record is nested too deeply"
# The beginning of the small file that Git leaves in the place of a large one.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Levels of a record: without a limit, records could not be sent to the workers' processes.
_DEEPEST = 200
# Whether the values of a column are wanted, by its name.
type Wanted = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record as the file holds it.

    Attributes:
        value: The JSON object or parquet row; empty where `broken` is set.
        file: The file's path as it was given.
        number: 1-based line (JSON lines) or position (JSON list, parquet, data set).
        unit: The unit of `number`, for example "line".
        broken: Why the record cannot be used, None in the usual case.
        first: Whether it is the first of its file, which shows the file's format.
        size: Its approximate size in bytes.
    """

    value: dict[str, Any]
    file: str
    number: int
    unit: Literal["line", "record"]
    broken: BrokenRecord | None = field(default=None, compare=False)
    first: bool = False
    size: int = field(default=0, compare=False)

    @property
    def where(self) -> str:
        """The place in words, for example "train.jsonl, line 3"."""
        return f"{self.file}, {self.unit} {self.number}"


def read_records(
    files: str | Path | Sequence[str | Path],
    split: Split = "train",
    wanted: Wanted | None = None,
) -> Iterator[RawRecord]:
    """Yield the records of all files, in the order of the files and of the records in them.

    Args:
        files: One path or several: files that end in .json (a list, or JSON lines), .jsonl, .ndjson or .csv,
            one of these followed by .gz or .zst, .parquet or .arrow; folders of such files, or ones that
            `datasets.Dataset.save_to_disk` wrote.
        split: The split to read of a folder that holds several. Of several names, the first that the folder
            has.
        wanted: Says of which columns of tables (parquet, arrow) the values are wanted, None for all. Where
            another column has a value, it is read as True.

    Raises:
        DataError: No file, a file that is missing, unreadable, cut off, empty or of unknown suffix, or a
            JSON list that is not JSON. Paths and suffixes of all files are checked before the first is
            read.
    """
    paths = [Path(file) for file in ([files] if isinstance(files, str | Path) else files)]
    if not paths:
        raise DataError("no data file was given; name at least one .json, .jsonl or .parquet file")
    inner = [file for path in paths for file in data_files(path, split)]
    for path in inner:
        yield from _read_file(path, split, wanted or _any)


def _any(name: str) -> bool:
    return True


def _read_file(path: Path, split: Split, wanted: Wanted) -> Iterator[RawRecord]:
    read = _READERS[suffix_of(path)] if path.is_file() else partial(_read_dataset, split=split)
    records = read(path, wanted)
    empty = True
    try:
        _check_pointer(path)
        for record in records:
            yield _first(record) if empty else record
            empty = False
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); check the file and its permissions"
        ) from error
    except MemoryError as error:
        raise DataError(
            f"{path}: takes more memory than there is ({error}); split it or shorten its records"
        ) from error
    if empty:
        raise DataError(
            f"{path}: holds no record; remove it from the list of files or write it again"
        )


def _check_pointer(path: Path) -> None:
    """Refuse a file that only names the data which Git LFS would put in its place."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise DataError(
                    f"{path}: is a pointer of Git LFS in the place of the data; run `git lfs pull` in its "
                    "repository, or download the file"
                )


def _first(record: RawRecord) -> RawRecord:
    """Return the record, marked as the first of its file; if it is no object, the whole file is in doubt."""
    if record.broken is not None and record.broken.reason == NOT_AN_OBJECT:
        raise DataError(
            f"{record.where}: a record must be an object with named fields, found {record.broken.detail}; "
            "wrap it in one or remove it"
        )
    return replace(record, first=True)


def _read_json(path: Path, wanted: Wanted) -> Iterator[RawRecord]:
    with open_data(path) as file:
        text = JsonText(file, path)
        if text.next_character() == "[":
            for number, ((value, objects), size) in enumerate(text.items(_decode), start=1):
                yield _record(value, path, number, "record", objects, size)
            return
    with open_data(path) as file:
        data = file.read(LARGEST_RECORD + 1)
    whole = len(data) <= LARGEST_RECORD
    if whole and _is_one_value(data):  # an object written over several lines
        value, objects = _parse(decoded(data, str(path)), path)
        yield _record(value, path, 1, "record", objects, len(data))
    elif whole or _is_one_value(data.lstrip().partition(b"\n")[0]):
        yield from _read_jsonl(path, wanted)
    else:
        raise DataError(
            f"{path}: its first line is no record, and a value of more than {LARGEST_RECORD:,} bytes is not "
            "read; write a list of records, or a record to each line"
        )


def _read_jsonl(path: Path, _: Wanted) -> Iterator[RawRecord]:
    # Bytes, because text mode would also end lines at characters that JSON strings may hold.
    with open_data(path) as file:
        first = True
        for number, line in enumerate(bounded_lines(file), start=1):
            if line.strip():
                if first:
                    _check_lines(line, path, number)
                yield _line(line, path, number, first)
                first = False


def _check_lines(line: bytes, path: Path, number: int) -> None:
    """Refuse a file whose first line, this one, begins a list."""
    if line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        kind = suffix_of(path)
        raise DataError(
            f"{path}, line {number}: begins with '[', but in {kind} a line must be an object with "
            f"named fields; if the file is one JSON list, end its name in .json in place of {kind}"
        )


def _line(line: bytes, path: Path, number: int, first: bool) -> RawRecord:
    where = f"{path}, line {number}"
    try:
        if len(line) > LARGEST_RECORD:
            raise DataError(
                f"{where}: longer than {LARGEST_RECORD:,} bytes; a line holds one record"
            )
        value, objects = _parse(decoded(line.rstrip(b"\r\n"), where), path, number)
    except DataError as error:
        # In the first line the whole file is in doubt, and a last line without an end was cut off.
        too_large = len(line) > LARGEST_RECORD
        if first or not (too_large or line.endswith(b"\n")):
            raise
        not_utf8 = isinstance(error.__cause__, UnicodeDecodeError)
        reason = TOO_LARGE if too_large else NOT_UTF8 if not_utf8 else NOT_JSON
        return _record(BrokenRecord(reason, str(error)), path, number, "line")
    return _record(value, path, number, "line", objects, len(line))


def _read_csv(path: Path, _: Wanted) -> Iterator[RawRecord]:
    for number, (row, size) in enumerate(csv_rows(path), start=1):
        yield _record(row, path, number, "record", size=size)


def _read_parquet(path: Path, wanted: Wanted) -> Iterator[RawRecord]:
    from megatron_profit.data.files.tables import parquet_batches

    with _whole(path, "a readable parquet file", ".jsonl"):
        yield from _rows(path, parquet_batches(path, wanted))


def _read_arrow(path: Path, wanted: Wanted) -> Iterator[RawRecord]:
    yield from _rows(path, _arrow_batches(path, wanted))


def _arrow_batches(path: Path, wanted: Wanted) -> Iterator[Any]:
    from megatron_profit.data.files.tables import arrow_batches

    with _whole(path, "an arrow file of the datasets library", ".parquet"):
        yield from arrow_batches(path, wanted)


@contextmanager
def _whole(path: Path, kind: str, other: str) -> Iterator[None]:
    """Raise a DataError where the block finds that a file is not of its kind; `other` is another format."""
    import pyarrow

    try:
        yield
    except DataError:
        raise
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(
            f"{path}: not {kind} ({error}); write it again, or convert it to {other}"
        ) from error


def _read_dataset(path: Path, wanted: Wanted, split: Split) -> Iterator[RawRecord]:
    """Yield the rows of a folder that `save_to_disk` of the datasets library wrote."""
    splits = saved_splits(path)
    folder = path / choose_split(splits, path, split) if splits else path
    state = folder / "state.json"
    if not splits and entry_of(state, "_split") != split:
        check_whole(path, split)
    names = _names_of(state)
    batches = (batch for name in names for batch in _arrow_batches(folder / name, wanted))
    yield from _rows(path, batches)


def _names_of(state: Path) -> list[str]:
    """Return the names of the files of a saved data set."""
    files = entry_of(state, "_data_files")
    entries = files if isinstance(files, list) else [None]
    names: list[Any] = [
        entry.get("filename") if isinstance(entry, dict) else None for entry in entries
    ]
    if not all(map(is_plain_name, names)):
        raise unreadable(state, f"_data_files is {shown(files)}, not a list of files in its folder")
    return names


def _rows(path: Path, tables: Iterable[Any]) -> Iterator[RawRecord]:
    """Yield the records of tables, numbered over all of them."""
    from megatron_profit.data.files.tables import portions

    number = 0
    for table in tables:
        for part, sizes in portions(table):
            # A row that is too large comes alone.
            rows = _values(part) if sizes[0] <= LARGEST_RECORD else [_too_large(sizes[0])]
            for row, size in zip(rows, sizes, strict=True):
                number += 1
                yield _record(row, path, number, "record", size=size)


def _too_large(size: int) -> BrokenRecord:
    return BrokenRecord(TOO_LARGE, f"it takes about {size:,} bytes")


def _values(table: Any) -> list[Any]:
    """Return the rows of a table; a `BrokenRecord` stands for each row that cannot be decoded."""
    from megatron_profit.data.files.arrow_values import converted

    try:
        return converted(table.to_pylist(), table.schema)
    except _UNHELD:
        if len(table) == 1:
            return [_unheld(table)]
    return [row for at in range(len(table)) for row in _values(table.slice(at, 1))]


# Dates and times out of range, unknown time zones, fields of one name, texts that are not UTF-8.
_UNHELD = (ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError)


def _unheld(row: Any) -> BrokenRecord:
    """Return why a table of one row cannot become a Python object."""
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            column.to_pylist()
        except _UNHELD as error:
            # Columns of text are not checked when they are written.
            reason = ROW_NOT_UTF8 if isinstance(error, UnicodeDecodeError) else NOT_HELD
            return BrokenRecord(reason, f"in the column {shown(name)}: {error}")
    return BrokenRecord(NOT_HELD, "its columns cannot be put together")


_READERS = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _record(
    value: Any,
    path: Path,
    number: int,
    unit: Literal["line", "record"],
    objects: "_Objects | None" = None,
    size: int = 0,
) -> RawRecord:
    """Return a value, or the reason why there is none, as the record at a place."""
    if (broken := _problem(value, objects)) is not None:
        return RawRecord({}, str(path), number, unit, broken)
    if objects is None:  # a row of a table, which has every field of the schema, used or not
        value = {name: without_nulls(item) for name, item in value.items()}
    return RawRecord(value, str(path), number, unit, size=size)


def _problem(value: Any, objects: "_Objects | None") -> BrokenRecord | None:
    """Return why a value is no record; None if it is one."""
    if isinstance(value, BrokenRecord):
        return value
    name = objects.named_twice(value) if objects else None
    if name is not None:
        return BrokenRecord(NAMED_TWICE, f"{shown(name)} stands twice in one object")
    if _nests_deeper(value, _DEEPEST):
        return BrokenRecord(TOO_DEEP, f"lists and objects stand in each other over {_DEEPEST} deep")
    if not isinstance(value, dict):
        return BrokenRecord(NOT_AN_OBJECT, f"{type(value).__name__} {shown(value)}")
    return None


def _nests_deeper(value: Any, limit: int) -> bool:
    """Return whether lists and objects are nested more than `limit` deep."""
    level = [value]
    for _ in range(limit + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return False
        level = [x for item in level for x in (item.values() if isinstance(item, dict) else item)]
    return True


class _Objects:
    """Makes the objects of a JSON text, and notes the ambiguous ones, which name a field twice.

    Attributes:
        doubtful: Identity of such an object -> the name, and the object, so that no other gets its identity.
    """

    def __init__(self) -> None:
        self.doubtful: dict[int, tuple[str, object]] = {}

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            self.doubtful[id(value)] = (most_common(name for name, _ in pairs), value)
        return value

    def named_twice(self, value: Any) -> str | None:
        """Return a name that an object inside `value` has twice, None if there is none."""
        stack = [value] if self.doubtful else []
        while stack:
            item = stack.pop()
            if id(item) in self.doubtful:
                return self.doubtful[id(item)][0]
            stack.extend(item.values() if isinstance(item, dict) else ())
            stack.extend(item if isinstance(item, list) else ())
        return None


def _decode(text: str, at: int) -> tuple[tuple[Any, _Objects], int]:
    """Return the JSON value that begins at a place of a text, and the place of its end."""
    objects = _Objects()
    value, end = json.JSONDecoder(object_pairs_hook=objects).raw_decode(text, at)
    return (value, objects), end


def _parse(text: str, path: Path, line: int = 1) -> tuple[Any, _Objects]:
    objects = _Objects()
    try:
        return json.JSONDecoder(object_pairs_hook=objects).decode(text), objects
    except json.JSONDecodeError as error:
        rest = text[error.pos : error.pos + 1000]
        raise broken_json(path, line + error.lineno - 1, error.colno, error.msg, rest) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, endless nesting
        raise DataError(
            f"{path}, line {line}: JSON that cannot be read ({error}); remove the record"
        ) from error


def _is_one_value(data: bytes) -> bool:
    """Return whether the data are one JSON value, perhaps over many lines, rather than JSON lines."""
    try:
        json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True
