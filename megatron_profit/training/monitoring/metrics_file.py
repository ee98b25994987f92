"""The metrics of a run as JSON lines: one object for each logged step, evaluation and event.

A run that resumes at step R makes the steps after R again. The lines that an earlier process logged for them
are moved to a second file next to it. So the file itself has each step once. Starts and events stay, as they
are history. A line is written whole or not at all. A last line that a crash has cut off is moved away too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoint_conversion.engine.output import whole_file
from checkpoint_conversion.engine.regular_files import open_to_append

SUPERSEDED = ".superseded"
# Kinds of lines that are written once for a step.
_UNIQUE = ("train", "evaluation")


class MetricsFile:
    """Appends to a file of JSON lines.

    Args:
        path: The file; its folder is made if it is missing.
        step: Steps that the weights have made when the run begins.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(open_to_append(path))  # before anything is read: it must be no link
        kept: list[bytes] = []
        moved: list[bytes] = []
        for line in _lines(path):
            (kept if _is_whole(line) and _stays(json.loads(line), step) else moved).append(line)
        if moved:
            self._move_away(kept, moved)
        records = [json.loads(line) for line in kept]
        self._written = {(r["kind"], r["step"]) for r in records if r["kind"] in _UNIQUE}
        self._file = open_to_append(path)

    def _move_away(self, kept: list[bytes], moved: list[bytes]) -> None:
        superseded = self._path.with_name(self._path.name + SUPERSEDED)
        with os.fdopen(open_to_append(superseded), "ab") as later:
            later.writelines(line if line.endswith(b"\n") else line + b"\n" for line in moved)
            os.fsync(later.fileno())
        with whole_file(self._path) as stream:
            stream.writelines(kept)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append an object. A step or evaluation that is already in the file is not written again.

        Args:
            kind: "start", "train", "evaluation" or "guard".
            step: Steps that are done.
            values: The rest of the object; a number that is not finite becomes null.

        Raises:
            OSError: The line cannot be written; the file is unchanged.
        """
        if (kind, step) in self._written:
            return
        text = json.dumps(_finite({"kind": kind, "step": step, **values}), allow_nan=False)
        self._append(text.encode() + b"\n")
        if kind in _UNIQUE:
            self._written.add((kind, step))

    def _append(self, line: bytes) -> None:
        if not self._is_in_place():
            gone, self._file = self._file, open_to_append(self._path)
            os.close(gone)
        size = os.fstat(self._file).st_size
        try:
            while line:  # a disk that is nearly full takes a part
                line = line[os.write(self._file, line) :]
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def _is_in_place(self) -> bool:
        """Return whether the open file is still the one under its name, and was not removed or replaced."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            return False


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, without a last line that was cut off.

    Raises:
        ValueError: A line is no object with a kind and a step.
    """
    for number, line in enumerate(_lines(path), 1):
        if _is_whole(line):
            yield json.loads(line)
        elif line.endswith(b"\n"):
            raise ValueError(f"{path}, line {number}: not an object with a kind and a step")


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.is_file() else []


def _is_whole(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    if not (line.endswith(b"\n") and isinstance(record, dict)):
        return False
    return isinstance(record.get("kind"), str) and type(record.get("step")) is int


def _stays(record: Mapping[str, Any], step: int) -> bool:
    return record["kind"] not in _UNIQUE or record["step"] <= step


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
