"""Facts about the data that the derived flags need: the length of its records, and the rows of an epoch.

The first records of each source tell the length. Then all records are prepared once, for rows of that length;
the training finds them in the cache. Where some are longer after all, all are measured and prepared again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Chunks of records (128 each) of a source that tell the length of its records.
_CHUNKS = 16
# Records of a step in the ProFit paper.
STEP_RECORDS = 32
# Rows of a step that these records should fill, where they are as short as that.
_ROWS_OF_STEP = 4
# Longest rows that are made for short records.
_USUAL_ROW = 8192
_SHORTEST_ROW = 256
_MULTIPLE = 64


@dataclass(frozen=True)
class Lengths:
    """Positions of the records of the data.

    Attributes:
        mean: Their mean.
        longest: The longest.
    """

    mean: float
    longest: int


def sample_lengths(
    options: Any,
    tokenizer: Path,
    limit: int,
    *,
    all_records: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Lengths:
    """Return the lengths of the first records of each source, or of all records.

    Args:
        options: The `DataOptions` of the flags.
        tokenizer: Folder of the tokenizer.
        limit: The model's positions.
        all_records: Whether to read all records.
        progress: Called with lines of text.

    Raises:
        DataError: The data or the tokenizer cannot be used.
    """
    from dataclasses import replace

    from megatron_profit.data.report import DataReport
    from megatron_profit.data.store.prepare import default_workers, tokenize_records

    preparation = replace(options.preparation, seq_length=limit)
    workers = options.workers or default_workers(options.train) if all_records else 1
    lengths: list[int] = []
    for source in options.train:
        chunks = tokenize_records(
            [source], tokenizer, preparation, DataReport(), workers=workers, progress=progress
        )
        for chunk in itertools.islice(chunks, None if all_records else _CHUNKS):
            lengths += (length - 1 for length in chunk.whole)
    return Lengths(sum(lengths) / len(lengths), max(lengths))


def row_length(lengths: Lengths, limit: int, packing: bool) -> int:
    """Return the positions of a row: the longest record fits, up to the model's positions.

    Packed rows are long enough for several records: a quarter of the records of a step, at most 8,192
    positions.
    """
    longest = min(lengths.longest, limit)
    if not packing:
        return min(math.ceil(longest / _MULTIPLE) * _MULTIPLE, limit)
    wanted = STEP_RECORDS * lengths.mean / _ROWS_OF_STEP
    several = min(max(_power_of_two(wanted), _SHORTEST_ROW), _USUAL_ROW)
    return min(max(_power_of_two(longest), several), limit)


def rows_of_step(lengths: Lengths, seq_length: int, packing: bool) -> int:
    """Return the rows that hold about as many records as a step of the paper."""
    if not packing:
        return STEP_RECORDS
    return max(1, math.ceil(STEP_RECORDS * min(lengths.mean, seq_length) / seq_length))


def _power_of_two(number: float) -> int:
    return 2 ** math.ceil(math.log2(max(number, 1)))


@dataclass(frozen=True)
class PreparedRows:
    """The prepared data of a run.

    Attributes:
        rows: Rows of an epoch.
        longest: Token ids of the longest record before it was cut, one more than its positions.
        cut: Records that lose their end.
        too_long: Records that are left out because a row is too short for them: with `--too-long drop`, or
            where the trained part stands behind the end of a row.
        turns: Turns that are left out, as far as each one is trained by itself.
        records: Records of an epoch.
        summary: A line about them.
    """

    rows: int
    longest: int
    cut: int
    too_long: int
    turns: int
    records: int
    summary: str

    @property
    def fit(self) -> bool:
        """Whether a row takes each record."""
        return not (self.cut or self.too_long or self.turns)


def prepare_rows(
    settings: Mapping[str, Any], tokenizer: Path, progress: Callable[[str], None]
) -> PreparedRows:
    """Prepare all data, or find them in the cache.

    Args:
        settings: The data flags, `seq_length` and `seed`, by argument.
        tokenizer: Folder of the tokenizer.
        progress: Called with lines of text.

    Raises:
        DataError: The data or the tokenizer cannot be used.
    """
    from megatron_profit.data import DataOptions, build_sets
    from megatron_profit.data.store.prepare import NOTHING_SUPERVISED, TOO_LONG, TURNS_LEFT_OUT

    train = build_sets(DataOptions.from_flags(settings), tokenizer, epochs=1, progress=progress)[
        "train"
    ]
    report, packing = train.prepared.report, train.packing
    share = packing.supervised / max(packing.tokens, 1)
    left_out = report.read - report.kept
    summary = (
        f"{report.kept:,} records{f' ({left_out:,} left out)' if left_out else ''}, "
        f"{packing.tokens:,} tokens, {share:.0%} supervised, in {packing.rows:,} rows of "
        f"{packing.seq_length:,} positions, {packing.efficiency:.0%} filled"
    )
    skipped, turns = report.skipped, report.found.get(TURNS_LEFT_OUT)
    return PreparedRows(
        rows=packing.rows,
        longest=report.longest,
        cut=report.truncated,
        too_long=sum(skipped[r].count for r in (TOO_LONG, NOTHING_SUPERVISED) if r in skipped),
        turns=0 if turns is None else turns.count,
        records=packing.examples,
        summary=summary,
    )
