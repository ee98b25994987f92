"""Safe opening of files that somebody else chose: only regular files, and only of a sensible size.

A pipe would wait for ever, and a device may never end. Either may be a link in a folder that was
downloaded. Links to regular files are followed: the HuggingFace cache is made of them.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.progress import human

# Far more than any configuration, index or tokenizer has.
MOST_JSON = 100_000_000
# A tokenizer reads the files of no other folder in a model folder.
CHAT_TEMPLATES = "additional_chat_templates"
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(file: str | Path) -> int:
    """Return a descriptor to read a file with.

    Raises:
        ConversionError: The file is not a regular file, or its name cannot be a file's.
        OSError: The file is missing or cannot be opened.
    """
    try:
        _check_kind(file, os.stat(file).st_mode)
        # If it becomes a pipe in the meantime, opening it does not wait.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError:
        raise ConversionError(f"{file}: no file can have this name") from None
    return _checked(descriptor, file)


def read_regular(file: str | Path, most: int = MOST_JSON) -> bytes:
    """Return the content of a small file.

    Args:
        most: The largest number of bytes allowed.

    Raises:
        ConversionError: The file is larger, or as `open_regular`.
        OSError: As `open_regular`, or the file cannot be read.
    """
    with open(open_regular(file), "rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ConversionError(f"{file}: larger than {human(most)}, the limit for such a file")
    return content


def check_readable(file: Path) -> None:
    """Refuse a file that cannot be opened or is not a regular one, before any work.

    Raises:
        ConversionError: Names the file.
    """
    try:
        os.close(open_regular(file))
    except OSError as error:
        raise ConversionError(
            f"{file} cannot be read: {error.strerror}; change its permissions, or remove it"
        ) from error


def open_to_append(file: Path) -> int:
    """Return a descriptor to read a file and write at its end; a missing file is made.

    Somebody else may write into the folder too, so a link in its place is not followed.

    Raises:
        ConversionError: The file is a link, or not a regular file.
        OSError: The file cannot be opened.
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
    return _checked(descriptor, file)


def check_model_folder(folder: Path) -> None:
    """Refuse a model folder that holds a pipe, device or the like, before another library opens it.

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
            continue  # a broken link fails later, where its file is needed
        if stat.S_ISDIR(found.st_mode):
            continue
        _check_kind(entry, found.st_mode)
        if entry.suffix == ".json" and found.st_size > MOST_JSON:
            raise ConversionError(f"{entry}: larger than {human(MOST_JSON)}, the limit for JSON")


def kind_of(mode: int) -> str | None:
    """Return a name for a mode (`os.stat`), for example "a pipe"; None for a regular file."""
    if stat.S_ISREG(mode):
        return None
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")


def _check_kind(file: str | Path, mode: int) -> None:
    if (kind := kind_of(mode)) is not None:
        raise ConversionError(f"{file} is {kind}; a regular file is needed")


def _checked(descriptor: int, file: str | Path) -> int:
    """Return the descriptor of a regular file, and close any other."""
    try:
        _check_kind(file, os.fstat(descriptor).st_mode)
    except ConversionError:
        os.close(descriptor)
        raise
    return descriptor
