"""Reads data files into raw records that remember where they came from.

Only the container is understood here (JSON list, JSON lines, parquet); what a record means is
decided in chat.py. A damaged container stops the reading: a file that ends in the middle must not
become a shorter data set.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_profit.data.errors import DataError, shown


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record as the file holds it.

    Attributes:
        value: The JSON object or parquet row.
        file: The file's path as it was given.
        number: 1-based line (JSON lines) or position (JSON list, parquet).
        unit: What `number` counts.
    """

    value: dict[str, Any]
    file: str
    number: int
    unit: Literal["line", "record"]

    @property
    def where(self) -> str:
        """The place in words, e.g. "train.jsonl, line 3"."""
        return f"{self.file}, {self.unit} {self.number}"


def read_records(files: str | Path | Sequence[str | Path]) -> Iterator[RawRecord]:
    """Yields the records of all files, in the order of the files and of the records in them.

    Args:
        files: One path or several, each ending in .json (a list, or JSON lines), .jsonl or
            .parquet.

    Raises:
        DataError: No file, a file that is missing, unreadable, empty or of unknown suffix, text
            that is not JSON, or a record that is not an object. Paths and suffixes of all files are
            checked before the first is read.
    """
    paths = [Path(file) for file in ([files] if isinstance(files, str | Path) else files)]
    if not paths:
        raise DataError("no data file was given; name at least one .json, .jsonl or .parquet file")
    for path in paths:
        _check_path(path)
    for path in paths:
        yield from _read_file(path)


def _check_path(path: Path) -> None:
    if path.suffix.lower() not in _READERS:
        raise DataError(
            f"{path}: unknown suffix {path.suffix!r}; convert it to one of {', '.join(_READERS)}"
        )
    if not path.is_file():
        finding = "is a directory; name the files in it" if path.is_dir() else "does not exist"
        raise DataError(f"{path}: {finding} (data files are looked for from {Path.cwd()})")


def _read_file(path: Path) -> Iterator[RawRecord]:
    empty = True
    try:
        for record in _READERS[path.suffix.lower()](path):
            empty = False
            yield record
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error}); check the file and its permissions"
        ) from error
    if empty:
        raise DataError(
            f"{path}: holds no record; remove it from the list of files or write it anew"
        )


def _read_json(path: Path) -> Iterator[RawRecord]:
    text = _decode(path.read_bytes(), str(path))
    if text.lstrip().startswith("["):
        values = enumerate(_parse(text, str(path)), start=1)
        return (_record(value, path, number, "record") for number, value in values)
    if _is_one_value(text):  # an object written over several lines
        return iter([_record(json.loads(text), path, 1, "record")])
    return _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[RawRecord]:
    # Bytes, because text mode would also end lines at characters that JSON strings may hold.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = _decode(line.rstrip(b"\r\n"), f"{path}, line {number}")
            if text.strip():
                yield _record(_parse(text, str(path), number), path, number, "line")


def _read_parquet(path: Path) -> Iterator[RawRecord]:
    for number, row in enumerate(_parquet_rows(path), start=1):
        yield _record(_without_nulls(row), path, number, "record")


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(
            f"{path}: not a readable parquet file ({error}); write it anew, or convert it to .jsonl"
        ) from error


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _record(value: Any, path: Path, number: int, unit: Literal["line", "record"]) -> RawRecord:
    if not isinstance(value, dict):
        raise DataError(
            f"{path}, {unit} {number}: a record must be an object with named fields, "
            f"found {type(value).__name__} {shown(value)}; wrap it in one or remove it"
        )
    return RawRecord(value, str(path), number, unit)


def _parse(text: str, file: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{file}, line {line + error.lineno - 1}, column {error.colno}"
        found = shown(text[error.pos :]) if text[error.pos :].strip() else "the end of the text"
        raise DataError(
            f"{place}: not valid JSON ({error.msg}), found {found}; correct it or remove the record"
        ) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, endless nesting
        raise DataError(
            f"{file}, line {line}: JSON that cannot be read ({error}); remove the record"
        ) from error


def _is_one_value(text: str) -> bool:
    """Whether the text is one JSON value, perhaps over many lines, rather than JSON lines."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 (byte {data[error.start]:#04x} at {error.start}); "
            "convert the file, e.g. with iconv -t utf-8"
        ) from error


def _without_nulls(value: Any) -> Any:
    """`value` without its null fields: a parquet row has every field of the schema, used or not."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
