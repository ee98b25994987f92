"""Opens other people's files: only regular ones, and never more of one in memory than a record may take.

A pipe or a device would block for ever or never end, and a small compressed file may unpack to terabytes.
"""

from __future__ import annotations

import gzip
import io
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_profit.data.errors import DataError

# Bytes of a record as the file spells it: about 8 million tokens.
LARGEST_RECORD = 32 * 2**20
# Bytes of a file that describes others, such as dataset_info.json.
LARGEST_JSON = 100 * 10**6
BLOCK = 2**20

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: Path) -> None:
    """Check that a path is a regular file, or a link to one.

    Raises:
        DataError: It is of another kind, which the message names.
        OSError: It does not exist, or may not be looked at.
    """
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:
        raise DataError(
            f"{path}: {_KINDS.get(kind, 'no regular file')}; a regular file is needed here"
        )


def check_json(path: Path) -> None:
    """Check that a JSON file that describes something is a regular file of a size that is read.

    Raises:
        DataError: It is of another kind, or larger.
        OSError: It does not exist, or may not be looked at.
    """
    check_regular(path)
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise DataError(
            f"{path}: has {size:,} bytes; of such a file at most {LARGEST_JSON:,} are read"
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


def bounded_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file with their ends.

    Of a line longer than `LARGEST_RECORD`, only one byte more than that is read.
    """
    while line := file.readline(LARGEST_RECORD + 1):
        yield line
        rest = line if len(line) > LARGEST_RECORD else b"\n"
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(BLOCK)
