"""Opens other people's files: only regular ones, and never more of one in memory than a record may take.

A pipe or a device would block for ever or never end, and a small compressed file may unpack to terabytes.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from checkpoint_conversion.engine.regular_files import MOST_JSON, kind_of
from megatron_profit.data.errors import DataError

# Bytes of a record as the file spells it: about 8 million tokens.
LARGEST_RECORD = 32 * 2**20
BLOCK = 2**20


def check_regular(path: Path) -> None:
    """Check that a path is a regular file, or a link to one.

    Raises:
        DataError: It is of another kind, which the message names.
        OSError: It does not exist, or may not be looked at.
    """
    if (kind := kind_of(path.stat().st_mode)) is not None:
        raise DataError(f"{path}: {kind}; a regular file is needed here")


def check_json(path: Path) -> None:
    """Check that a JSON file that describes something is a regular file of a size that is read.

    Raises:
        DataError: It is of another kind, or larger.
        OSError: It does not exist, or may not be looked at.
    """
    check_regular(path)
    if (size := path.stat().st_size) > MOST_JSON:
        raise DataError(
            f"{path}: has {size:,} bytes; of such a file at most {MOST_JSON:,} are read"
        )


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file. Errors are the same as for `check_regular`."""
    check_regular(path)
    return path.open("rb")


def open_data(path: Path) -> IO[bytes]:
    """Open a data file for reading, unpacked if its name ends in .gz or .zst.

    Errors are the same as for `check_regular`.
    """
    check_regular(path)
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file that describes data.

    Raises:
        DataError: It is no regular file, cannot be read, is too large or is not JSON.
    """
    try:
        check_json(path)
        return json.loads(path.read_bytes())
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error


def bounded_lines_of_any_end(file: IO[bytes]) -> Iterator[bytes]:
    r"""Yield the lines of a file with their ends: \n, \r\n, or \r alone.

    A line longer than `LARGEST_RECORD` is the last one, cut one byte after that limit.
    """
    rest = b""
    while block := file.read(BLOCK):
        # The last one may go on, or its \r be followed by a \n.
        *lines, rest = (rest + block).splitlines(keepends=True)
        yield from lines
        if len(rest) > LARGEST_RECORD:
            break
    if rest:
        yield rest[: LARGEST_RECORD + 1]


def bounded_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file with their ends.

    Of a line longer than `LARGEST_RECORD`, only one byte more than that is read.
    """
    while line := file.readline(LARGEST_RECORD + 1):
        yield line
        rest = line if len(line) > LARGEST_RECORD else b"\n"
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(BLOCK)
