"""Tokenised records as flat arrays, in memory or mapped from the files of a folder.

A folder is complete or absent: it is written under another name and renamed. Mapped arrays cost no memory of
their own and are shared by all processes of a machine.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoint_conversion.errors import escaped
from megatron_profit.data.report import DataReport, Found
from megatron_profit.data.store.checksums import CheckedFiles

ABOUT = "about.json"


@dataclass(frozen=True, slots=True)
class Examples:
    """Tokenised records, end to end.

    Attributes:
        ids: [total] int32 token ids of all examples.
        supervised: [total] uint8, 1 where the model must produce this token.
        offsets: [N + 1] int64; example i is the range offsets[i]:offsets[i + 1].
    """

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Return ids [L] and supervised [L] of one example, views without a copy."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[part], self.supervised[part]

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """[N], the positions of a row that each example takes: its last id is a label only."""
        return np.diff(self.offsets) - 1


@dataclass(frozen=True, slots=True)
class TokenizedData:
    """Examples, and the place of each one's record.

    Attributes:
        examples: The tokenised records.
        sources: [N] int32, the number of the source.
        files: [N] int32, the number of the file among all sources' files.
        file_names: Names of these files, with as many of their folders as tell them apart.
        numbers: [N] int64, line or position in the file (see `RawRecord.number`).
        digests: [N] uint64, a hash of the ids of all examples of its record; equal for equal records.
        labels: [N] int32, trained labels of each example; its first id is no label.
        report: The counts of all records.
    """

    examples: Examples
    sources: npt.NDArray[np.int32]
    files: npt.NDArray[np.int32]
    file_names: Sequence[str]
    numbers: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]
    labels: npt.NDArray[np.int32]
    report: DataReport

    def name(self, index: int) -> str:
        """Return the place of an example's record.

        It is FILE:LINE for JSON lines, and FILE:POSITION for other files.
        """
        return f"{escaped(self.file_names[self.files[index]])}:{self.numbers[index]}"


@dataclass(frozen=True, slots=True)
class ExampleBatch:
    """Some examples of one file, and the records left out between them.

    Attributes:
        source, file: As in `TokenizedData`.
        read: Records that went in.
        ids, supervised: As in `Examples`.
        lengths: Ids of each example.
        whole: The same before truncation.
        numbers, digests, labels: As in `TokenizedData`.
        skipped: (place, reason, detail) of each record that was left out.
        truncated: Places of the records that lost their end.
        unread: Unread field -> usable records that have it.
        found: Findings in the examples, by name.
        refused: Why the file that begins with this chunk cannot be used at all, "" if it can.
    """

    source: int
    file: int
    read: int
    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.uint8]
    lengths: list[int]
    whole: list[int]
    numbers: list[int]
    digests: list[int]
    labels: list[int]
    skipped: list[tuple[str, str, str]]
    truncated: list[str]
    unread: dict[str, int]
    found: dict[str, Found]
    refused: str = ""


# File of a prepared folder -> its type.
_ARRAYS = {
    "ids": np.int32,
    "supervised": np.uint8,
    "offsets": np.int64,
    "sources": np.int32,
    "files": np.int32,
    "numbers": np.int64,
    "digests": np.uint64,
    "labels": np.int32,
}
# Files of a prepared folder.
FILES = (*_ARRAYS, ABOUT)


def _arrays(chunk: ExampleBatch) -> dict[str, npt.NDArray[Any]]:
    return {
        "ids": chunk.ids,
        "supervised": chunk.supervised,
        "offsets": np.asarray(chunk.lengths, dtype=np.int64),  # summed up at the end
        "sources": np.full(len(chunk.lengths), chunk.source, dtype=np.int32),
        "files": np.full(len(chunk.lengths), chunk.file, dtype=np.int32),
        "numbers": np.asarray(chunk.numbers, dtype=np.int64),
        "digests": np.asarray(chunk.digests, dtype=np.uint64),
        "labels": np.asarray(chunk.labels, dtype=np.int32),
    }


def _prepared(
    arrays: Mapping[str, npt.NDArray[Any]], file_names: Sequence[str], report: DataReport
) -> TokenizedData:
    return TokenizedData(
        Examples(arrays["ids"], arrays["supervised"], arrays["offsets"]),
        sources=arrays["sources"],
        files=arrays["files"],
        file_names=file_names,
        numbers=arrays["numbers"],
        digests=arrays["digests"],
        labels=arrays["labels"],
        report=report,
    )


def _offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def collect(
    chunks: Iterable[ExampleBatch], file_names: Sequence[str], report: DataReport
) -> TokenizedData:
    """Return the examples of all chunks, in memory. `report` is complete when the chunks end."""
    parts = [_arrays(chunk) for chunk in chunks]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in _ARRAYS}
    return _prepared({**arrays, "offsets": _offsets(arrays["offsets"])}, file_names, report)


def write(
    chunks: Iterable[ExampleBatch], report: DataReport, folder: Path, about: dict[str, Any]
) -> None:
    """Write the examples of all chunks as they come; the memory for one chunk suffices.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    lengths = [np.zeros(0, dtype=np.int64)]
    with CheckedFiles(folder) as files:
        for chunk in chunks:
            arrays = _arrays(chunk)
            lengths.append(arrays.pop("offsets"))
            for name, array in arrays.items():
                files.append(name, array.astype(_ARRAYS[name], copy=False))
        files.append("offsets", _offsets(np.concatenate(lengths)))
        text = json.dumps({**about, "report": report.as_json()}, indent=1, default=str)
        files.append(ABOUT, text.encode() + b"\n")
        files.finish()


def load(folder: Path, file_names: Sequence[str]) -> TokenizedData:
    """Return the examples that `write` put into a folder, mapped into memory.

    The caller has checked the files.
    """
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    arrays = {
        name: np.memmap(folder / name, dtype=kind, mode="r") for name, kind in _ARRAYS.items()
    }
    return _prepared(arrays, file_names, DataReport.from_json(about["report"]))
