"""The records of all sources, cut into tasks for the workers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_profit.data.chat.conversations import is_read
from megatron_profit.data.errors import DataError
from megatron_profit.data.files.records import RawRecord, read_records
from megatron_profit.data.files.sources import ColumnMapping, DataSource

CHUNK_RECORDS = 128
CHUNK_BYTES = 8 * 2**20
# Names of a message's role in JSON text.
_ROLES = ('"role"', '"from"')


@dataclass(frozen=True, slots=True)
class Task:
    """Records of one file for a worker."""

    source: int
    file: int
    layout: ColumnMapping
    records: list[RawRecord]
    each_turn: bool = False

    @property
    def size(self) -> int:
        """Approximate bytes of its examples."""
        return sum(size_of_examples(record, self.each_turn) for record in self.records)


def size_of_examples(record: RawRecord, each_turn: bool) -> int:
    """Return about as many bytes as the examples of a record take.

    Args:
        record: The record.
        each_turn: Whether each turn is the end of an example, which holds all turns before it; then there are
            at most as many examples as the longest list of the record has entries.
    """
    if not each_turn:
        return record.size
    return record.size * max(map(_entries, record.value.values()), default=1)


def _entries(value: object) -> int:
    """Return the number of entries of a list, or of messages in JSON text; at least 1."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        return max(1, *(value.count(role) for role in _ROLES))
    return max(1, len(value)) if isinstance(value, list) else 1


def tasks_of(sources: Sequence[DataSource], *, each_turn: bool = False) -> Iterator[Task]:
    """Yield the tasks of all sources, in order.

    Args:
        sources: The sources.
        each_turn: Whether a record gives an example for each of its turns.

    Raises:
        DataError: A file cannot be read, or no record of a source has a column that was named.
    """
    # Every path is looked at before the first file is read.
    files = [source.files() for source in sources]
    numbers = itertools.count()
    for source_number, source in enumerate(sources):
        missing = set(source.layout.columns.values())
        for file, number in zip(files[source_number], numbers, strict=False):
            records = read_records(file, source.split, is_read(source.layout))
            for batch in _batches(_noting_keys(records, missing), each_turn):
                yield Task(source_number, number, source.layout, batch, each_turn)
        if missing and not source.layout.optional >= missing:
            raise DataError(
                f"{source.path}: no record has the column "
                f"{', '.join(sorted(missing))}; correct the names of the columns"
            )


def _batches(records: Iterable[RawRecord], each_turn: bool = False) -> Iterator[list[RawRecord]]:
    """Yield records in lists that are worth sending to another process; large examples in short lists."""
    batch: list[RawRecord] = []
    size = 0
    for record in records:
        batch.append(record)
        size += size_of_examples(record, each_turn)
        if len(batch) == CHUNK_RECORDS or size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _noting_keys(records: Iterator[RawRecord], missing: set[str]) -> Iterator[RawRecord]:
    for record in records:
        if missing:
            missing.difference_update(record.value)
        yield record
