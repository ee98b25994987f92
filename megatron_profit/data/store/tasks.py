"""The records of all sources, cut into tasks for the workers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_profit.data.chat.conversations import is_read
from megatron_profit.data.errors import DataError
from megatron_profit.data.files.records import RawRecord, read_records
from megatron_profit.data.files.sources import ColumnMapping, DataSource

_CHUNK_RECORDS = 128
_CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Task:
    """Records of one file for a worker."""

    source: int
    file: int
    layout: ColumnMapping
    records: list[RawRecord]

    @property
    def size(self) -> int:
        """Approximate bytes of its records."""
        return sum(record.size for record in self.records)


def tasks_of(sources: Sequence[DataSource]) -> Iterator[Task]:
    """Yield the tasks of all sources, in order."""
    # Every path is looked at before the first file is read.
    files = [source.files() for source in sources]
    numbers = itertools.count()
    for source_number, source in enumerate(sources):
        missing = set(source.layout.columns.values())
        for file, number in zip(files[source_number], numbers, strict=False):
            records = read_records(file, source.split, is_read(source.layout))
            for batch in _batches(_noting_keys(records, missing)):
                yield Task(source_number, number, source.layout, batch)
        if missing and not source.layout.optional >= missing:
            raise DataError(
                f"{source.path}: no record has the column "
                f"{', '.join(sorted(missing))}; correct the names of the columns"
            )


def _batches(records: Iterable[RawRecord]) -> Iterator[list[RawRecord]]:
    """Yield records in lists that are worth sending to another process; large records in short lists."""
    batch: list[RawRecord] = []
    size = 0
    for record in records:
        batch.append(record)
        size += record.size
        if len(batch) == _CHUNK_RECORDS or size >= _CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _noting_keys(records: Iterator[RawRecord], missing: set[str]) -> Iterator[RawRecord]:
    for record in records:
        if missing:
            missing.difference_update(record.value)
        yield record
