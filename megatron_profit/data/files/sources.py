"""The sources of data and the names of their columns: files, or entries of a dataset_info.json.

The form of dataset_info.json is LLaMA-Factory's (its data/README.md), so that a folder made for it can be
used unchanged. Settings that this project cannot honour (pictures, preference pairs, hubs) are refused by
name.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from checkpoint_conversion.errors import escaped
from megatron_profit.data.errors import BrokenRecord, DataError, shown
from megatron_profit.data.files.bounded import read_json
from megatron_profit.data.files.fields import WRONG_TYPE, read
from megatron_profit.data.files.splits import Split, data_files, left_out, not_data

# Our names of the columns, which are LLaMA-Factory's too -> the key that `normalise` looks for.
ALPACA_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "tools": "tools",
}
SHAREGPT_COLUMNS = {"messages": "messages", "system": "system", "tools": "tools"}
COLUMNS = (*ALPACA_COLUMNS, "messages")
# Columns that a record cannot do without, if its layout names them.
REQUIRED_COLUMNS = ("prompt", "response", "messages")
MISSING_COLUMN = "a mapped column is missing"
_TEXT_COLUMNS = ("prompt", "query", "response", "system")

# LLaMA-Factory's tags and the defaults that they have there.
_ROLE_TAGS = {
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_TAGS = {"role_tag": "from", "content_tag": "value", **_ROLE_TAGS}
_OUR_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
# openai: sharegpt with the fields and roles of the API.
_FORMATTINGS = ("alpaca", "sharegpt", "openai")
_UNSUPPORTED_COLUMNS = ("images", "videos", "audios", "chosen", "rejected", "kto_tag")
_ENTRY_KEYS = ("file_name", "formatting", "columns", "tags", "split", "num_samples", "ranking")
# A note for people, which LLaMA-Factory does not compare either.
_NOT_READ = ("file_sha1",)
# The number of unread names that are printed.
_NAMED = 5


@dataclass(frozen=True)
class ColumnMapping:
    """The names of a file's fields, where its keys do not tell.

    Attributes:
        columns: Our name of a column -> its name in the file. Empty: the keys tell the format.
        sharegpt: The record is a list of messages, rather than a prompt and a response.
        tags: LLaMA-Factory's names for the fields and the roles of a message; empty for the usual ones.
        optional: Columns of the file that nobody named and that it need not have.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    sharegpt: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        known = SHAREGPT_COLUMNS if self.sharegpt else ALPACA_COLUMNS
        for name in self.columns:
            if name not in known:
                kind = "a list of messages" if self.sharegpt else "prompts and responses"
                raise DataError(
                    f"the column {name!r} is not known for {kind}; known are {', '.join(known)}"
                )
        needed = ("messages",) if self.sharegpt else ("prompt", "response")
        for name in needed:
            if self.columns and name not in self.columns:
                raise DataError(f"no column is named for {name}; name {' and '.join(needed)}")
        for name in self.tags:
            if name not in _TAGS:
                raise DataError(f"the tag {name!r} is not known; known are {', '.join(_TAGS)}")

    @classmethod
    def of_columns(cls, pairs: Iterable[str]) -> "ColumnMapping":
        """Return the layout of "name=column" pairs, for example prompt=question response=answer."""
        columns: dict[str, str] = {}
        for pair in pairs:
            name, equals, column = pair.partition("=")
            if not (name and equals and column) or name not in COLUMNS:
                raise DataError(
                    f"{pair!r} maps no column; write NAME=COLUMN with one of {', '.join(COLUMNS)}, "
                    "e.g. prompt=question response=answer"
                )
            if name in columns:
                raise DataError(
                    f"--data-columns maps {name} twice, to {columns[name]!r} and to {column!r}; drop one"
                )
            columns[name] = column
        return cls(columns, sharegpt="messages" in columns)

    def renamed(self, value: dict[str, Any]) -> dict[str, Any]:
        """Return the record under the names that `normalise` knows.

        Raises:
            BrokenRecord: A column that the record cannot do without is missing, or one of texts holds no
                text.
        """
        if not self.columns and not self.tags:
            return value
        target = SHAREGPT_COLUMNS if self.sharegpt else ALPACA_COLUMNS
        record = {}
        for name, column in self.columns.items():
            if value.get(column) is not None:
                record[target[name]] = _checked(name, column, value[column])
            elif name in REQUIRED_COLUMNS:
                raise BrokenRecord(
                    MISSING_COLUMN, f"no {column!r} (for {name}) among {shown(list(value))}"
                )
        messages = read(record["messages"]) if self.tags and "messages" in record else None
        if isinstance(messages, list):
            record["messages"] = [self._message(read(entry)) for entry in messages]
        return record

    def unnamed(self, value: Mapping[str, Any]) -> set[str]:
        """Return columns of a record that have a value and no name in this layout, if it names any."""
        if not self.columns:
            return set()
        named = self.columns.values()
        return {key for key, item in value.items() if item is not None and key not in named}

    def _message(self, entry: Any) -> Any:
        if not isinstance(entry, dict):
            return entry
        tags = {**_TAGS, **self.tags}
        role, content = tags["role_tag"], tags["content_tag"]
        roles = {tags[tag]: ours for tag, ours in _OUR_ROLES.items()}
        message = {key: item for key, item in entry.items() if key not in (role, content)}
        if role in entry:
            name = entry[role]
            message["role"] = roles.get(name, name) if isinstance(name, str) else name
        if content in entry:
            message["content"] = entry[content]
        return message


def _checked(name: str, column: str, value: Any) -> Any:
    """Return the value of a column, in whose own name a wrong type is reported."""
    if isinstance(value, list) and name in ("prompt", "response"):  # perhaps of messages
        return value
    if name in _TEXT_COLUMNS and not isinstance(value, str):
        raise BrokenRecord(
            WRONG_TYPE, f"the column {shown(column)} (for {name}) is {shown(value)}, not str"
        )
    return value


@dataclass(frozen=True)
class DataSource:
    """One entry of --data.

    Attributes:
        path: File or folder.
        layout: Names of its fields.
        weight: Average number of times that an epoch holds each record. For example, 1.5 means once or twice.
        split: Split of a folder that holds several; of several names, the first that the folder has.
        num_samples: Examples of an epoch at weight 1, None for all; where there are fewer, some come again.
    """

    path: str
    layout: ColumnMapping = field(default_factory=ColumnMapping)
    weight: float = 1.0
    split: Split = "train"
    num_samples: int | None = None

    def files(self) -> list[Path]:
        """Return the files that are read, in order: see `data_files`."""
        return data_files(Path(self.path), self.split)

    @property
    def left_out(self) -> str:
        """A sentence on the split of a folder that is read and its unread part; "" if all is read."""
        split, others = left_out(Path(self.path), self.split)
        notes = []
        if others:
            notes.append(f"only the split {split} is read, not {shown(others)}")
        elif split != self.split and split:
            notes.append(f"the split {split} is read")
        if names := not_data(Path(self.path)):
            more = ", ..." if len(names) > _NAMED else ""
            notes.append(
                "folders and files of unknown suffix are not read: "
                f"{len(names)} ({', '.join(map(shown, names[:_NAMED]))}{more})"
            )
        return escaped(f"{self.path}: {'; '.join(notes)}") if notes else ""


def read_sources(
    names: Sequence[str],
    *,
    weights: Sequence[float] = (),
    columns: Sequence[str] = (),
    dataset_info: str | None = None,
    split: Split = "train",
) -> tuple[DataSource, ...]:
    """Return the sources that the flags of the command line describe.

    Args:
        names: Files and folders; with `dataset_info` also names of its entries.
        weights: One for each name; none for 1 each.
        columns: "name=column" pairs, for the files that `dataset_info` does not describe.
        dataset_info: Path of a dataset_info.json, or of the folder that holds it.
        split: The split to read of folders with splits, where an entry names none.

    Raises:
        DataError: A setting is unknown, contradicts itself or cannot be honoured.
    """
    if weights and len(weights) != len(names):
        raise DataError(
            f"--data-weights gives {len(weights)} weights for {len(names)} files; give one for each"
        )
    entries, folder = _read_info(dataset_info) if dataset_info else ({}, Path())
    layout = ColumnMapping.of_columns(columns)
    sources = []
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        if not 0 < weight < float("inf"):
            raise DataError(f"--data-weights gives {name} the weight {weight}; it must be above 0")
        if name in entries:
            sources.append(_from_entry(name, entries[name], folder, weight, split))
        elif dataset_info and not os.path.exists(name):
            raise DataError(
                f"{name} is neither a file nor an entry of {dataset_info}, which has "
                f"{shown(_nearest_first(name, entries))}"
            )
        else:
            sources.append(DataSource(name, layout, weight, split))
    return tuple(sources)


def refuse_unused(names: Iterable[str], columns: Sequence[str], dataset_info: str | None) -> None:
    """Refuse flags on the columns of data to which none of the data are subject.

    Args:
        names: All that the flags of data name.
        columns, dataset_info: As in `read_sources`.

    Raises:
        DataError: Names the flag.
    """
    if not dataset_info:
        return
    entries, _ = _read_info(dataset_info)
    described = [name in entries for name in names]
    if not any(described):
        raise DataError(
            f"--dataset-info {dataset_info} describes none of the data; name entries of it, of "
            f"{shown(sorted(entries))}, or drop it"
        )
    if columns and all(described):
        raise DataError(
            f"--data-columns applies to none of the data, since --dataset-info {dataset_info} describes them "
            "all; drop it, or name the columns there"
        )


def places_of_entries(dataset_info: str, names: Iterable[str]) -> list[Path]:
    """Return the files and folders of the entries with these names; a name without an entry has none.

    Raises:
        DataError: The dataset_info.json cannot be read.
    """
    entries, folder = _read_info(dataset_info)
    found = [entries[name] for name in names if isinstance(entries.get(name), dict)]
    files = [entry.get("file_name") for entry in found]
    return [folder / file for file in files if isinstance(file, str)]


def _nearest_first(name: str, entries: Mapping[str, Any]) -> list[str]:
    """Return the entries, first the ones that are spelt nearly like `name`, also with other capitals."""
    near = {entry.lower(): entry for entry in entries}
    first = [near[key] for key in get_close_matches(name.lower(), near)]
    return [*first, *sorted(set(entries) - set(first))]


def _read_info(path: str) -> tuple[dict[str, Any], Path]:
    file = Path(path) / "dataset_info.json" if os.path.isdir(path) else Path(path)
    try:
        entries = read_json(file)
    except DataError as error:
        raise DataError(f"--dataset-info {error}") from error
    if not isinstance(entries, dict):
        raise DataError(f"--dataset-info {file}: must be an object of entries by name")
    return entries, file.parent


def _from_entry(name: str, entry: Any, folder: Path, weight: float, split: Split) -> DataSource:
    where = f"the entry {name} of dataset_info.json"
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {shown(entry)}, not an object")
    entry = {key: value for key, value in entry.items() if value not in (None, "")}
    if not isinstance(entry.get("file_name"), str):
        raise DataError(
            f"{where} names no file_name (found {shown(sorted(entry))}); nothing is downloaded here: "
            "save the data set to a file and name it"
        )
    formatting = entry.get("formatting", "alpaca")
    if formatting not in _FORMATTINGS:
        raise DataError(
            f"{where}: formatting {formatting!r} is not one of {', '.join(_FORMATTINGS)}"
        )
    if entry.get("ranking"):
        raise DataError(f"{where} holds preference pairs (ranking), which are not for SFT")
    for key in entry:
        if key not in (*_ENTRY_KEYS, *_NOT_READ) and not key.endswith("_hub_url"):
            raise DataError(f"{where}: {key} is not supported; known are {', '.join(_ENTRY_KEYS)}")
    num_samples = _entry_value(where, entry, "num_samples", int, None)
    if num_samples is not None and num_samples < 1:
        raise DataError(f"{where}: num_samples is {num_samples}; it must be at least 1")
    return DataSource(
        str(folder / entry["file_name"]),
        _entry_layout(where, entry, formatting),
        weight,
        split=_entry_value(where, entry, "split", str, split),
        num_samples=num_samples,
    )


def _entry_layout(where: str, entry: dict[str, Any], formatting: str) -> ColumnMapping:
    sharegpt = formatting != "alpaca"
    columns, tags = (_entry_names(where, entry, key) for key in ("columns", "tags"))
    for column in columns:
        if column in _UNSUPPORTED_COLUMNS:
            raise DataError(f"{where}: {column} is not supported; text is all that is trained here")
    if sharegpt:
        defaults = {"messages": "conversations" if formatting == "sharegpt" else "messages"}
    else:
        defaults = {"prompt": "instruction", "query": "input", "response": "output"}
    # As in LLaMA-Factory: whoever names one column names all of them.
    try:
        return ColumnMapping(
            columns or defaults,
            sharegpt,
            tags={**_TAGS, **tags} if sharegpt else {},
            optional=frozenset() if columns else frozenset({"input"}),
        )
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _entry_names(where: str, entry: dict[str, Any], key: str) -> dict[str, str]:
    """Return the names by name; a null or empty one counts as absent, as in LLaMA-Factory."""
    names = _entry_value(where, entry, key, dict, {})
    names = {name: value for name, value in names.items() if value not in (None, "")}
    for name, value in names.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: {name} in {key} is {shown(value)}, not str")
    return names


def _entry_value(where: str, entry: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = entry.get(key, default)
    if value is not default and (not isinstance(value, kind) or isinstance(value, bool)):
        raise DataError(f"{where}: {key} is {shown(value)}, not {kind.__name__}")
    return value
