"""Options, tables and error handling that the three commands share."""

from __future__ import annotations

import argparse
import io
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from checkpoint_conversion.engine.dtypes import CHOICES, DType
from checkpoint_conversion.engine.workers import peak_memory
from checkpoint_conversion.errors import ConversionError, printable
from checkpoint_conversion.hf.chunks import TRANSFER_BYTES
from checkpoint_conversion.progress import human

DRY_RUN = "check everything and print each tensor; read no data, write nothing"
# Defaults that mean the flag's absence.
_WITHOUT: tuple[object, ...] = ("", (), [], argparse.SUPPRESS)
IGNORE_ARGUMENTS = "do not compare the arguments that the checkpoint keeps with config.json"


class FlagHelp(argparse.RawDescriptionHelpFormatter):
    """Formats help that marks required flags and names defaults, unless the text of a flag names its own."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if action.required and action.option_strings:
            mark = "required"
        elif default is None or default is False or default in _WITHOUT or "default" in text:
            return text
        else:
            mark = "default " + ("on" if default is True else "%(default)s")
        end = "." if text.endswith(".") else ""
        return f"{text.removesuffix('.')} ({mark}){end}"


def program(module: str) -> str:
    """Return the name of a command in its help: the way in which it was called.

    For example, "megatron-profit verify", or else "python -m checkpoint_conversion.verify".
    """
    called = sys.argv[0]
    return called if called.startswith("megatron-profit ") else f"python -m {module}"


def add_output_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the options of the commands that write a folder, which need not be `required`."""
    parser.add_argument("--out", required=required, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype", choices=CHOICES, default="source", help="dtype to write (default: as it is)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier output of this command"
    )
    parser.add_argument(
        "--check-finite", action="store_true", help="refuse weights that hold NaN or infinity"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="threads that read and write (default: one per core, at most 8)",
    )


def output_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the options of `add_output_options`, besides --out, by name."""
    return {n: getattr(options, n) for n in ("dtype", "overwrite", "check_finite", "workers")}


def part_bytes(shape: Sequence[int], dtype: DType) -> int:
    """Return how many bytes of a tensor are moved at a time: whole rows."""
    row = math.prod(shape[1:]) * dtype.itemsize
    return min(max(TRANSFER_BYTES, row), shape[0] * row)


def print_totals(count: str, nbytes: int, workers: int, parts: Sequence[tuple[int, bool]]) -> None:
    """Print the last line of a dry run.

    Args:
        parts: For each tensor, the bytes that are moved at a time, and whether its dtype changes.
    """
    largest, converts = max(size for size, _ in parts), any(changes for _, changes in parts)
    peak = human(peak_memory(workers, largest, converts))
    print(f"total: {count}, {nbytes} bytes ({human(nbytes)}); about {peak} of memory")


def run(main: Callable[[], int]) -> None:
    """Run a command; print an error instead of a traceback and exit with code 2.

    Ctrl-C and SIGTERM stop the command like an error, so that it can clean up. A scheduler sends
    SIGTERM, for example, when a job's time limit is reached.
    """
    before = signal.signal(signal.SIGTERM, _terminated)
    escape_unencodable()
    try:
        sys.exit(main())
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        _terminated(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def escape_unencodable() -> None:
    """Print characters that the terminal's encoding lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _terminated(number: int, _: object = None) -> None:
    print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
    sys.exit(128 + number)


def wants_color() -> bool:
    """Return whether standard output is a terminal and the user has not switched colours off (NO_COLOR)."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in aligned columns."""
    cells = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
