"""The files of a folder that hold the records of a split, and the splits of a folder."""

import itertools
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_profit.data.errors import DataError, shown
from megatron_profit.data.files.bounded import read_json

_STANDARD_INPUT = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
_NOT_A_FILE = (
    "data are read more than once (every start looks whether they are prepared already), so write them to a "
    "file, e.g. zcat chats.gz > chats.jsonl, and name it; .gz and .zst files are read as they are"
)
# The name of a split; or, if none was asked for, the names that are accepted, the best first.
type Split = str | tuple[str, ...]
VALID_SPLITS = ("validation", "test")
# A word in the name of a file that holds one split -> the split, as on the Hub.
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
# As on the Hub, a digit separates words too: test2.jsonl holds a test split.
_SPLIT_NAME = re.compile(rf"(?:^|[-_. 0-9])({'|'.join(_SPLITS)})[-_. 0-9]", re.IGNORECASE)
# A piece of a split as the Hub has it, whatever the split is called: train_sft-00000-of-00003.parquet.
_PIECE = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})[-.]")
# JSON files that are no data, and other files that usually lie next to data.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
_BESIDE_DATA = (".*", "readme*", "*.md", "license*", "licence*", "notice*", "citation*")
_TEXT = (".json", ".jsonl", ".ndjson", ".csv")
_COMPRESSED = (".gz", ".zst")

# The remedy for texts without roles.
PLAIN_TEXT = (
    "plain text names no part that the model should write: make records of it, with what comes first as "
    "prompt and what the model should write as completion"
)
# Endings of the files that are read; the ones of text may be followed by a compression.
SUFFIXES = (*_TEXT, ".parquet", ".arrow")
# All endings, with compression.
ENDINGS = (*SUFFIXES, *(text + packed for text in _TEXT for packed in _COMPRESSED))


def data_files(path: Path, split: Split = "train") -> list[Path]:
    """Return the data files of a folder, sorted by name.

    A file, or a data set of the `datasets` library, is returned as it is. If file names contain a split, only
    the files of `split` are returned. For example, "train" takes train-00000-of-00001.parquet and leaves out
    gsm8k_test.jsonl.

    Raises:
        DataError: The path does not exist, cannot be read, or its names do not show which files are `split`.
    """
    try:
        return _data_files(path, split)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); check the name and the permissions"
        ) from error


def _data_files(path: Path, split: Split) -> list[Path]:
    if str(path) in _STANDARD_INPUT:
        raise DataError(f"{path}: {_NOT_A_FILE}")
    if not path.exists():
        found = "is a link that leads nowhere" if path.is_symlink() else "does not exist"
        raise DataError(f"{path}: {found} (data files are looked for from {Path.cwd()})")
    if path.is_dir() and not is_dataset(path):
        _check_links(path)
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
    if path.is_file() and not suffix_of(path):
        plain = f"; {PLAIN_TEXT}" if path.suffix.lower() in (".txt", ".md") else ""
        raise DataError(
            f"{path}: unknown suffix {path.suffix!r}; convert it to one of {_known()}{plain}"
        )
    if path.is_file() and not _is_named_after(path.name, split):
        check_whole(path, split)
    if splits := _splits_inside(path, split):
        choose_split(splits.values(), path, split)
    return [path]


def check_whole(path: Path, split: Split) -> None:
    """Refuse a split other than the default for data without splits."""
    if isinstance(split, str) and split != "train":
        raise DataError(f"{path}: holds no splits, so that {split!r} is none; leave out the split")


def left_out(path: Path, split: Split) -> tuple[str, list[str]]:
    """Return the split of a folder that is read, and its unread part: files, or splits of a saved data set.

    The result is "" and an empty list if the folder holds no splits.
    """
    splits = _splits_inside(path, split)
    chosen = choose_split(splits.values(), path, split) if splits else ""
    return chosen, [name for name, found in splits.items() if found != chosen]


def not_data(path: Path) -> list[str]:
    """Return the names of the entries in a folder of files that are not read, whatever the split.

    Entries that data sets usually have next to their data are not listed.
    """
    if not path.is_dir() or is_dataset(path):
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
    return sorted(filter(is_data_file, folder.iterdir()))


def is_data_file(path: Path) -> bool:
    """Return whether a file holds records, judged by its name; dataset_infos.json, for example, does not."""
    return bool(suffix_of(path)) and path.is_file() and path.name not in _DESCRIPTIONS


def _of_split(files: list[Path], folder: Path, split: Split) -> list[Path]:
    """Return the files of the split, or all files where no name holds a split."""
    splits = _splits_inside(folder, split)
    if not splits:
        if not _is_named_after(files[0].name, split):
            check_whole(folder, split)
        return _complete(files, folder)
    if unclear := [name for name, found in splits.items() if not found]:
        raise DataError(
            f"{folder}: {shown(unclear)} lie beside files named after a split "
            f"({', '.join(sorted(filter(None, set(splits.values()))))}); name the files to read"
        )
    chosen = choose_split(splits.values(), folder, split)
    return _complete([file for file in files if splits[file.name] == chosen], folder)


def _check_links(folder: Path) -> None:
    """Refuse a folder with a link to a data file that is not there, as a cache has it after a clean-up."""
    links = (entry for entry in sorted(folder.iterdir()) if suffix_of(entry) and entry.is_symlink())
    if broken := next((link for link in links if not link.exists()), None):
        raise DataError(
            f"{broken}: is a link that leads nowhere; get the file again, or name the files to read"
        )


def _complete(files: list[Path], folder: Path) -> list[Path]:
    """Return the files, of which none may be missing, or be there in two formats."""
    _check_pieces(files, folder)
    _check_formats(files, folder)
    return files


def _check_pieces(files: list[Path], folder: Path) -> None:
    """Refuse files of which some pieces are missing, as after half a download."""
    pieces: dict[tuple[str, str], set[int]] = {}
    for piece in filter(None, (_PIECE.match(file.name) for file in files)):
        pieces.setdefault((piece[1], piece[3]), set()).add(int(piece[2]))
    for (name, count), numbers in pieces.items():
        if len(numbers) < int(count):
            first = next(number for number in itertools.count() if number not in numbers)
            raise DataError(
                f"{folder}: {len(numbers)} of the {int(count)} pieces of {name} are here, and "
                f"{name}-{first:05}-of-{count} is not; get all of them, or name the files to read"
            )


def _check_formats(files: list[Path], folder: Path) -> None:
    """Refuse a file that is there in two formats: its records would come twice."""
    formats: dict[str, list[str]] = {}
    for file in files:
        ending = max((e for e in ENDINGS if file.name.lower().endswith(e)), key=len)
        formats.setdefault(file.name[: -len(ending)], []).append(file.name)
    if twice := next((names for names in formats.values() if len(names) > 1), None):
        raise DataError(
            f"{folder}: {shown(twice)} have one name, so they may hold the same records in several formats; "
            "remove all but one, or name the files to read"
        )


def _splits_inside(path: Path, split: Split) -> dict[str, str]:
    """Return the split of each file of a folder, "" if its name shows none.

    For a saved `DatasetDict` each split maps to itself. The result is empty where there are no splits. Names
    of pieces, such as abc-00000-of-00003.parquet, count as splits only if a word in one of them says so, or
    if `split` is one of them.
    """
    if is_dataset(path):
        return {name: name for name in saved_splits(path)}
    if not path.is_dir():
        return {}
    splits = {file.name: _split_of(file.name) for file in _files_inside(path)}
    names = set(splits.values())
    return splits if split in names or any(map(_word_of, names)) else {}


def saved_splits(folder: Path) -> list[str]:
    """Return the names of the splits that the `datasets` library saved in a folder; [] for one data set.

    Raises:
        DataError: Its description is damaged.
    """
    if (folder / "state.json").is_file():  # one data set
        return []
    description = folder / "dataset_dict.json"
    splits = entry_of(description, "splits")
    if not isinstance(splits, list) or not all(map(is_plain_name, splits)):
        raise unreadable(description, f"splits is {shown(splits)}, not a list of names")
    if not splits:
        raise unreadable(description, "it has no split")
    return splits


def entry_of(description: Path, name: str) -> Any:
    """Return a field of a JSON file that describes a saved data set; None where there is none."""
    value = read_json(description)
    return value.get(name) if isinstance(value, dict) else None


def is_plain_name(name: object) -> bool:
    """Return whether a name means an entry of a folder, rather than a file elsewhere."""
    return isinstance(name, str) and "\0" not in name and Path(name).name == name


def choose_split(names: Iterable[str], path: Path, split: Split) -> str:
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
    place = folder if is_dataset(path) else "the files to read"
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


def is_dataset(path: Path) -> bool:
    """Return whether `save_to_disk` of the datasets library wrote a folder."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _known() -> str:
    return f"{', '.join(SUFFIXES)}, and {', '.join(_TEXT)} followed by {' or '.join(_COMPRESSED)}"


def suffix_of(path: Path) -> str:
    """Return the suffix that chooses the reader, "" if there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        return suffixes[-2] if suffixes[:-1] and suffixes[-2] in _TEXT else ""
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


def unreadable(description: Path, why: str) -> DataError:
    """Return the error of a folder of the `datasets` library that cannot be read."""
    return DataError(
        f"{description}: not a readable data set of the datasets library ({why}); write it again "
        "with save_to_disk"
    )
