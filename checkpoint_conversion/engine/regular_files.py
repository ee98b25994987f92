"""Opening files that somebody else chose: only regular ones, and no more of them than is sensible.

A pipe would wait for ever, a device may never end, and either may be a link in a folder that was downloaded.
Links to regular files are followed: the HuggingFace cache is made of them.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.progress import human

# No configuration, index or tokenizer is nearly as large.
MOST_JSON = 100_000_000
# The only folder of a model folder whose files a tokenizer reads.
CHAT_TEMPLATES = "additional_chat_templates"
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(file: str | Path) -> int:
    """A descriptor to read a file with.

    Raises:
        ConversionError: It is no regular file, or its name cannot be one.
        OSError: It is missing or cannot be opened.
    """
    try:
        _check_kind(file, os.stat(file).st_mode)
        # Should it become a pipe meanwhile, opening it does not wait.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError:
        raise ConversionError(f"{file}: no file can have this name") from None
    try:
        _check_kind(file, os.fstat(descriptor).st_mode)
    except ConversionError:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(file: str | Path, most: int = MOST_JSON) -> bytes:
    """The content of a small file.

    Args:
        most: Bytes that it may have.

    Raises:
        ConversionError: It is larger, or as `open_regular`.
        OSError: As `open_regular`, or it cannot be read.
    """
    with open(open_regular(file), "rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ConversionError(f"{file}: larger than {human(most)}, the limit for such a file")
    return content


def open_to_append(file: Path) -> int:
    """A descriptor to read a file and write at its end; it is made if it does not exist.

    Somebody else may write into the folder too, so a link in its place is not followed.

    Raises:
        ConversionError: It is a link, or no regular file.
        OSError: It cannot be opened.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(file, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConversionError(
                f"{file} is a symbolic link, which is not written through; remove it, or name the file it "
                "leads to"
            ) from error
        raise
    try:
        _check_kind(file, os.fstat(descriptor).st_mode)
    except ConversionError:
        os.close(descriptor)
        raise
    return descriptor


def check_model_folder(folder: Path) -> None:
    """Refuse a model folder in which something is no regular file, before another library opens it.

    Raises:
        ConversionError: Names the entry, or a JSON file that is too large.
        OSError: The folder cannot be listed.
    """
    templates = folder / CHAT_TEMPLATES
    inner = templates.iterdir() if templates.is_dir() else ()
    for entry in sorted((*folder.iterdir(), *inner)):
        try:
            found = entry.stat()
        except OSError:
            continue  # a broken link is missed where it is needed
        if stat.S_ISDIR(found.st_mode):
            continue
        _check_kind(entry, found.st_mode)
        if entry.suffix == ".json" and found.st_size > MOST_JSON:
            raise ConversionError(f"{entry}: larger than {human(MOST_JSON)}, the limit for JSON")


def _check_kind(file: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise ConversionError(f"{file} is {kind}; a regular file is needed")
