"""Reads data files into raw records that remember their place.

This module understands only the container: JSON list, JSON lines, compressed or not, parquet, a folder of the
`datasets` library. data/chat/conversations.py decides what a record means. A line that is no record is passed
on as broken, to be counted. A damaged container stops the reading: a file that ends in the middle must not
become a shorter data set.
"""

import codecs
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatron_profit.data.errors import BrokenRecord, DataError, shown
from megatron_profit.data.files.bounded import LARGEST_RECORD, bounded_lines, open_data, read_json
from megatron_profit.data.files.fields import NAMED_TWICE, most_common, without_nulls
from megatron_profit.data.files.json_text import JsonText, broken_json, decoded

NOT_JSON = "a line is not JSON"
NOT_UTF8 = "a line is not UTF-8"
ROW_NOT_UTF8 = "a text of the record is not UTF-8"
NOT_HELD = "a value of the record cannot be read"
TOO_LARGE = f"a record has more than {LARGEST_RECORD:,} bytes"
NOT_AN_OBJECT = "a record is not an object with named fields"
TOO_DEEP = "a record is nested too deeply"

# Levels of a record: without a limit, records could not be sent to the workers' processes.
_DEEPEST = 200

_STANDARD_INPUT = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
_NOT_A_FILE = (
    "data are read more than once (every start looks whether they are prepared already), so write them to a "
    "file, e.g. zcat chats.gz > chats.jsonl, and name it; .gz and .zst files are read as they are"
)

# Whether the values of a column are wanted, by its name.
type Wanted = Callable[[str], bool]
# The name of a split; or, if none was asked for, the names that are accepted, the best first.
type Split = str | tuple[str, ...]
VALID_SPLITS = ("validation", "test")

# A word in the name of a file that holds one split -> the split, as on the Hub.
_SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "eval": "test",
}
_SPLIT_NAME = re.compile(rf"(?:^|[-_. ])({'|'.join(_SPLITS)})[-_. ]", re.IGNORECASE)
# A piece of a split as the Hub has it, whatever the split is called: train_sft-00000-of-00003.parquet.
_PIECE = re.compile(r"(.+)-\d{5,}-of-\d{5,}[-.]")

# JSON files that are no data, and other files that usually lie next to data.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
_BESIDE_DATA = (".*", "readme*", "*.md", "license*", "licence*", "notice*", "citation*")


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
        files: One path or several: files that end in .json (a list, or JSON lines), .jsonl or .ndjson, one of
            these followed by .gz or .zst, .parquet or .arrow; folders of such files, or ones that
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


def data_files(path: Path, split: Split = "train") -> list[Path]:
    """Return the data files of a folder, sorted by name; a data set of the `datasets` library or a file is
    itself.

    If file names contain a split, only the files of `split` are returned. For example, "train" takes
    train-00000-of-00001.parquet and leaves out gsm8k_test.jsonl.

    Raises:
        DataError: The path does not exist, cannot be read, or its names do not show which files are `split`.
    """
    if str(path) in _STANDARD_INPUT:
        raise DataError(f"{path}: {_NOT_A_FILE}")
    if not path.exists():
        found = "is a link that leads nowhere" if path.is_symlink() else "does not exist"
        raise DataError(f"{path}: {found} (data files are looked for from {Path.cwd()})")
    if path.is_dir() and not _is_dataset(path):
        inner = _files_inside(path)
        if not inner:
            folders = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
            remedy = (
                f"one of its folders {shown(folders)}, or another" if folders else "another one"
            )
            raise DataError(
                f"{path}: the directory holds neither data files ({_known()}) nor a data set that "
                f"datasets' save_to_disk wrote; name {remedy}"
            )
        return _of_split(inner, path, split)
    if not path.is_dir() and not path.is_file():
        raise DataError(f"{path}: neither a file nor a folder; {_NOT_A_FILE}")
    if path.is_file() and not _kind(path):
        raise DataError(f"{path}: unknown suffix {path.suffix!r}; convert it to one of {_known()}")
    if path.is_file() and not _is_named_after(path.name, split):
        _check_whole(path, split)
    if splits := _splits_inside(path, split):
        _choose(splits.values(), path, split)
    return [path]


def _check_whole(path: Path, split: Split) -> None:
    """Refuse a split other than the default for data without splits."""
    if isinstance(split, str) and split != "train":
        raise DataError(f"{path}: holds no splits, so that {split!r} is none; leave out the split")


def left_out(path: Path, split: Split) -> tuple[str, list[str]]:
    """Return the split of a folder that is read, and its unread part: files, or splits of a saved data set.

    The result is "" and an empty list if the folder holds no splits.
    """
    splits = _splits_inside(path, split)
    chosen = _choose(splits.values(), path, split) if splits else ""
    return chosen, [name for name, found in splits.items() if found != chosen]


def not_data(path: Path) -> list[str]:
    """Return the names of the entries in a folder of files that are not read, whatever the split.

    Entries that data sets usually have next to their data are not listed.
    """
    if not path.is_dir() or _is_dataset(path):
        return []
    data = _files_inside(path)
    others = sorted(file.name for file in path.iterdir() if file not in data)
    return [
        name
        for name in others
        if name not in _DESCRIPTIONS
        and not any(fnmatch(name.lower(), pattern) for pattern in _BESIDE_DATA)
    ]


def _files_inside(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if _kind(file) and file.is_file() and file.name not in _DESCRIPTIONS
    )


def _of_split(files: list[Path], folder: Path, split: Split) -> list[Path]:
    """Return the files of the split, or all files where no name holds a split."""
    splits = _splits_inside(folder, split)
    if not splits:
        if not _is_named_after(files[0].name, split):
            _check_whole(folder, split)
        return files
    if unclear := [name for name, found in splits.items() if not found]:
        raise DataError(
            f"{folder}: {shown(unclear)} lie beside files named after a split "
            f"({', '.join(sorted(filter(None, set(splits.values()))))}); name the files to read"
        )
    chosen = _choose(splits.values(), folder, split)
    return [file for file in files if splits[file.name] == chosen]


def _splits_inside(path: Path, split: Split) -> dict[str, str]:
    """Return the split of each file of a folder, "" if its name shows none.

    For a saved `DatasetDict` each split maps to itself. The result is empty where there are no splits. Names
    of pieces, such as abc-00000-of-00003.parquet, count as splits only if a word in one of them says so, or
    if `split` is one of them.
    """
    if _is_dataset(path):
        return {name: name for name in _saved_splits(path)}
    if not path.is_dir():
        return {}
    splits = {file.name: _split_of(file.name) for file in _files_inside(path)}
    names = set(splits.values())
    return splits if split in names or any(map(_word_of, names)) else {}


def _saved_splits(folder: Path) -> list[str]:
    if (folder / "state.json").is_file():  # one data set
        return []
    description = folder / "dataset_dict.json"
    splits = _entry(description, "splits")
    if not isinstance(splits, list) or not all(map(_is_plain_name, splits)):
        raise _unreadable(description, f"splits is {shown(splits)}, not a list of names")
    if not splits:
        raise _unreadable(description, "it has no split")
    return splits


def _entry(description: Path, name: str) -> Any:
    """Return a field of a JSON file that describes a saved data set; None where there is none."""
    value = read_json(description)
    return value.get(name) if isinstance(value, dict) else None


def _is_plain_name(name: object) -> bool:
    """Return whether a name means an entry of a folder, rather than a file elsewhere."""
    return isinstance(name, str) and "\0" not in name and Path(name).name == name


def _choose(names: Iterable[str], path: Path, split: Split) -> str:
    """Return the split that is meant: the one of that very name, else the only one with a word for it."""
    known = sorted(set(names))
    for wanted in (split,) if isinstance(split, str) else split:
        if wanted in known:
            return wanted
        alike = [name for name in known if wanted and _word_of(name) == _as_word(wanted)]
        if len(alike) > 1:
            raise DataError(
                f"{path}: {wanted!r} may be any of the splits {', '.join(alike)} (of "
                f"{', '.join(known)}); {_how_to_choose(path, alike[0])}"
            )
        if alike:
            return alike[0]
    if isinstance(split, str):
        wanted, remedy = repr(split), _how_to_choose(path, known[0])
    else:
        wanted = " or ".join(map(repr, split))
        remedy = "name the file or folder to evaluate on, or set records aside with --valid-split"
    raise DataError(f"{path}: has no split {wanted} but {', '.join(known)}; {remedy}")


def _how_to_choose(path: Path, name: str) -> str:
    folder = f"the folder of one, e.g. {path / name}"
    place = folder if _is_dataset(path) else "the files to read"
    return f'name {place}, or an entry of a dataset_info.json with "split": "{name}"'


def _split_of(file: str) -> str:
    """Return the split in a file's name; "" if there is none.

    A piece gives its whole split, for example "train_sft" for train_sft-00000-of-00003.parquet.
    """
    piece = _PIECE.match(file)
    return piece[1] if piece else _word_of(file)


def _word_of(name: str) -> str:
    """Return the split that the first such word in a file's or split's name means, "" if there is none.

    For example, "validation" for "my-valid-set" if `valid` is a word for it.
    """
    found = _SPLIT_NAME.search(f"{name}.")
    return _as_word(found[1]) if found else ""


def _is_named_after(file: str, split: Split) -> bool:
    return isinstance(split, str) and (
        split == _split_of(file) or _as_word(split) == _word_of(file)
    )


def _as_word(split: str) -> str:
    return _SPLITS.get(split.lower(), split)


def _is_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _known() -> str:
    return f"{', '.join(_READERS)}, and {', '.join(_JSON)} followed by {' or '.join(_COMPRESSED)}"


def _kind(path: Path) -> str:
    """Return the suffix that chooses the reader, "" if there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        return suffixes[-2] if suffixes[:-1] and suffixes[-2] in _JSON else ""
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else ""


def _read_file(path: Path, split: Split, wanted: Wanted) -> Iterator[RawRecord]:
    read = _READERS[_kind(path)] if path.is_file() else partial(_read_dataset, split=split)
    records = read(path, wanted)
    empty = True
    try:
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
            f"{path}: holds no record; remove it from the list of files or write it anew"
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
        kind = _kind(path)
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
        return RawRecord({}, str(path), number, "line", BrokenRecord(reason, str(error)))
    return _record(value, path, number, "line", objects, len(line))


def _read_parquet(path: Path, wanted: Wanted) -> Iterator[RawRecord]:
    import pyarrow

    from megatron_profit.data.files.tables import parquet_batches

    try:
        yield from _rows(path, parquet_batches(path, wanted))
    except DataError:
        raise
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(
            f"{path}: not a readable parquet file ({error}); write it anew, or convert it to .jsonl"
        ) from error


def _read_arrow(path: Path, wanted: Wanted) -> Iterator[RawRecord]:
    yield from _rows(path, _arrow_batches(path, wanted))


def _arrow_batches(path: Path, wanted: Wanted) -> Iterator[Any]:
    import pyarrow

    from megatron_profit.data.files.tables import arrow_batches

    try:
        yield from arrow_batches(path, wanted)
    except DataError:
        raise
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(
            f"{path}: not an arrow file of the datasets library ({error}); write it again, or "
            "convert it to .parquet"
        ) from error


def _read_dataset(path: Path, wanted: Wanted, split: Split) -> Iterator[RawRecord]:
    """Yield the rows of a folder that `save_to_disk` of the datasets library wrote."""
    splits = _saved_splits(path)
    folder = path / _choose(splits, path, split) if splits else path
    state = folder / "state.json"
    if not splits and _entry(state, "_split") != split:
        _check_whole(path, split)
    names = _names_of(state)
    batches = (batch for name in names for batch in _arrow_batches(folder / name, wanted))
    yield from _rows(path, batches)


def _names_of(state: Path) -> list[str]:
    """Return the names of the files of a saved data set."""
    files = _entry(state, "_data_files")
    entries = files if isinstance(files, list) else [None]
    names: list[Any] = [
        entry.get("filename") if isinstance(entry, dict) else None for entry in entries
    ]
    if not all(map(_is_plain_name, names)):
        raise _unreadable(
            state, f"_data_files is {shown(files)}, not a list of files in its folder"
        )
    return names


def _unreadable(description: Path, why: str) -> DataError:
    return DataError(
        f"{description}: not a readable data set of the datasets library ({why}); write it again "
        "with save_to_disk"
    )


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
                if isinstance(row, BrokenRecord):
                    yield RawRecord({}, str(path), number, "record", row)
                else:
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
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
_JSON = (".json", ".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".zst")


def _record(
    value: Any,
    path: Path,
    number: int,
    unit: Literal["line", "record"],
    objects: "_Objects | None" = None,
    size: int = 0,
) -> RawRecord:
    name = objects.named_twice(value) if objects else None
    if name is not None:
        broken = BrokenRecord(NAMED_TWICE, f"{shown(name)} stands twice in one object")
        return RawRecord({}, str(path), number, unit, broken)
    if _nests_deeper(value, _DEEPEST):
        broken = BrokenRecord(
            TOO_DEEP, f"lists and objects stand in each other over {_DEEPEST} deep"
        )
        return RawRecord({}, str(path), number, unit, broken)
    if isinstance(value, dict):
        if objects is None:  # a row of a table, which has every field of the schema, used or not
            value = {name: without_nulls(item) for name, item in value.items()}
        return RawRecord(value, str(path), number, unit, size=size)
    found = BrokenRecord(NOT_AN_OBJECT, f"{type(value).__name__} {shown(value)}")
    return RawRecord({}, str(path), number, unit, found)


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
    """Makes the objects of a JSON text, and notes objects that name a field twice: their meaning is
    ambiguous.

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
