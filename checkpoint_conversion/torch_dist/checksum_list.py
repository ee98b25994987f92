"""`checksums.json` of a checkpoint: checksums of the files that have none inside.

The entries in `.distcp` files are archives with checksums of their own. `.metadata`, which holds their
places, and the small files next to it have none. The list is written when all of them are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from checkpoint_conversion.engine.checksums import crc32
from checkpoint_conversion.engine.output import write_file
from checkpoint_conversion.engine.regular_files import open_regular
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.folder import read_json_object

CHECKSUMS = "checksums.json"
_FORMAT = 1
_PART_BYTES = 1 << 20
# metadata.json is written after the list, and each of its few words is checked. The means of an
# evaluation may be written even later.
_NOT_LISTED = (CHECKSUMS, "metadata.json", "validation.json")


def write_checksums(folder: Path) -> None:
    """Write the list for a checkpoint that is complete except for metadata.json.

    Raises:
        ConversionError: A file cannot be read, or the list cannot be written.
    """
    found = {file.name: _checksum(file) for file in sorted(folder.iterdir()) if _is_listed(file)}
    content = {"format": _FORMAT, "crc32": found}
    write_file(folder / CHECKSUMS, f"{json.dumps(content, indent=1)}\n".encode())


def check_listed(folder: Path) -> None:
    """Compare the files of a checkpoint with its list, if it has one.

    Raises:
        ConversionError: A file is missing or was changed, or the list itself is damaged.
    """
    for name in listed_checksums(folder):
        check_checksum(folder / name, _checksum(folder / name))


def check_checksum(file: Path, found: str) -> None:
    """Compare the checksum of a file with the checkpoint's list, if the list has the file.

    Raises:
        ConversionError: The two differ.
    """
    if listed_checksums(file.parent).get(file.name, found) != found:
        raise ConversionError(
            f"{file} is damaged: its checksum is {found}, not the one in {file.parent / CHECKSUMS}"
        )


def listed_checksums(folder: Path) -> Mapping[str, str]:
    """Return the list of a checkpoint, by the names of its files; empty without one.

    Raises:
        ConversionError: The list is damaged.
    """
    file = folder / CHECKSUMS
    if not (file.exists() or file.is_symlink()):
        return {}
    content = read_json_object(file)
    listed = content.get("crc32")
    is_list = isinstance(listed, dict) and all(Path(name).name == name for name in listed)
    if content.get("format") != _FORMAT or not is_list:
        raise ConversionError(f"{file}: damaged, or of a newer version")
    assert isinstance(listed, dict)
    return listed


def checksum_of(content: bytes) -> str:
    """Return the checksum of bytes, in the form of the list."""
    return f"{crc32(content):08x}"


def _is_listed(file: Path) -> bool:
    return file.is_file() and file.suffix != ".distcp" and file.name not in _NOT_LISTED


def _checksum(file: Path) -> str:
    found = 0
    try:
        with open(open_regular(file), "rb") as stream:
            while data := stream.read(_PART_BYTES):
                found = crc32(data, found)
    except FileNotFoundError:
        raise ConversionError(f"{file}: missing") from None
    except OSError as error:
        raise ConversionError(f"{file}: {error.strerror}") from error
    return f"{found:08x}"
