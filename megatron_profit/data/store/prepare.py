"""Files of chat records -> tokenised examples, by several processes where there is much to do.

This process reads the files, in order. The workers render and tokenise chunks of raw records. The chunks come
back in order, so that the result does not depend on the number of workers.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import date
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_profit.data.chat.conversations import Conversation, normalise
from megatron_profit.data.chat.masks import NOTHING_TRAINED
from megatron_profit.data.errors import BrokenRecord, DataError
from megatron_profit.data.files.records import RawRecord
from megatron_profit.data.files.sources import DataSource
from megatron_profit.data.render.renderer import (
    ChatRenderer,
    RenderedConversation,
    SupervisionPolicy,
)
from megatron_profit.data.render.template import load_tokenizer
from megatron_profit.data.report import DataReport, Finding, Found, SourceCounts
from megatron_profit.data.store.examples import ExampleBatch, Examples, collect
from megatron_profit.data.store.tasks import CHUNK_BYTES, CHUNK_RECORDS, Task, tasks_of
from megatron_profit.parent_death import die_with_parent

NOTHING_SUPERVISED = "no supervised token is left within the sequence length"
TOO_LONG = "the record is longer than the sequence length"
# Findings in records that are used, see `Finding`.
NULLS_LEFT_OUT = "null fields of tool calls and tools that are left out"
TURNS_LEFT_OUT = "turns that are left out, as they do not fit into the sequence length"
PROGRESS_SECONDS = 2.0
# Below this, starting processes takes longer than the work.
_BYTES_PER_WORKER = 8 * 2**20
_CHUNKS_AHEAD = 4
_BYTES_AHEAD = 256 * 2**20


@dataclass(frozen=True)
class Preparation:
    """The settings with which records become examples.

    Together with the files and the tokenizer they decide the result.

    Attributes:
        seq_length: Positions of a training row, at least 1. An example of L ids gives L - 1 pairs of token
            and label, so up to `seq_length` + 1 ids are kept. For example, 4,097 ids fill a row of 4,096.
        too_long: The treatment of a record with more: it loses its end, or is left out and counted.
        training: The parts of the assistant's turns that are trained.
        day: The day for a chat template that writes today's date, None for other templates.
        allowed_tokens: Special tokens of the tokenizer that texts of records may hold, as tokens.
    """

    seq_length: int
    too_long: Literal["truncate", "drop"] = "truncate"
    training: SupervisionPolicy = field(default_factory=SupervisionPolicy)
    day: date | None = None
    allowed_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise ValueError(f"seq_length must be at least 1, got {self.seq_length}")
        if self.too_long not in ("truncate", "drop"):
            raise ValueError(f"too_long is {self.too_long!r}; it must be truncate or drop")


def build_examples(
    files: str | Path | Sequence[str | Path],
    renderer: ChatRenderer,
    seq_length: int,
) -> tuple[Examples, DataReport]:
    """Reads, normalises, renders and tokenises every record of the files, in memory and in this process.

    Args:
        files: Paths as in `read_records`.
        renderer: Renders and masks a conversation.
        seq_length: Positions of a training row.

    Raises:
        ValueError: `seq_length` < 1.
        DataError: A file cannot be read, its first record is in no known format, or no record of a file is
            usable.
    """
    names = [files] if isinstance(files, str | Path) else files
    sources = [DataSource(str(name)) for name in names]
    preparation = Preparation(seq_length, training=renderer.training)
    report = DataReport()
    chunks = tokenize_records(sources, renderer, preparation, report)
    names = file_names([source.files() for source in sources])
    return collect(chunks, names, report).examples, report


def tokenize_records(
    sources: Sequence[DataSource],
    renderer: ChatRenderer | Path,
    preparation: Preparation,
    report: DataReport,
    *,
    workers: int = 1,
    progress: Callable[[str], None] | None = None,
) -> Iterator[ExampleBatch]:
    """Yield the examples of all sources, in order, while `report` counts them.

    Args:
        sources: The sources to read.
        renderer: Renders and masks; or the folder of a tokenizer, from which each worker makes one.
        preparation: The settings with which records become examples.
        report: Complete when the chunks end.
        workers: Processes, where the folder of a tokenizer is given; 1 is this process.
        progress: Called with a line of text about every two seconds.

    Raises:
        DataError: A file cannot be read, its first record is in no known format, no record of a source is
            usable, or the tokenizer cannot be used.
    """
    report.sources = [SourceCounts(source.path) for source in sources]
    # Loaded here first, so that a tokenizer that cannot be used is reported once and with its reason.
    loaded = _load_renderer(renderer, preparation) if isinstance(renderer, Path) else renderer
    report.turn_end_id = loaded.markers.end_id
    tell = _Ticker(progress, report)
    tasks = tasks_of(sources, each_turn=preparation.training.turns == "each")
    if isinstance(renderer, Path) and workers > 1:
        chunks = _parallel(tasks, renderer, preparation, workers)
    else:
        chunks = map(_Worker(loaded, preparation), tasks)
    for chunk in chunks:
        if chunk.refused:
            raise DataError(chunk.refused)
        kept = len(set(chunk.numbers))  # the examples of a record are of one number
        report.sources[chunk.source].add(chunk.read, kept, chunk.lengths, chunk.labels)
        for skipped in chunk.skipped:
            report.skip(*skipped)
        report.leave_unread(chunk.unread)
        report.find(chunk.found)
        if chunk.lengths:
            report.keep(chunk.lengths, chunk.whole, chunk.truncated)
            yield chunk
        tell()
    if useless := [source.path for source in report.sources if not source.kept]:
        of = f" of {', '.join(useless)}" if report.kept else ""
        raise DataError(f"no record{of} can be used for training:", *str(report).splitlines())


def file_names(files: Iterable[Sequence[Path]]) -> list[str]:
    """Return the content of `TokenizedData.file_names` for the files of each source.

    Each name has as much of its path's end as tells all files apart. For example, a/x.jsonl and b/x.jsonl
    keep their folders.
    """
    paths = [file.absolute() for inner in files for file in inner]
    for parts in itertools.count(1):
        names = [str(Path(*path.parts[-parts:])) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def default_workers(sources: Sequence[DataSource]) -> int:
    """Return as many processes as the data are worth, and at most one for each core."""
    files = [file for source in sources for file in source.files()]
    size = sum(
        inner.stat().st_size
        for file in files
        for inner in (file.rglob("*") if file.is_dir() else [file])
    )
    return max(1, min(len(os.sched_getaffinity(0)), size // _BYTES_PER_WORKER))


def _parallel(
    tasks: Iterable[Task], tokenizer: Path, preparation: Preparation, workers: int
) -> Iterator[ExampleBatch]:
    # Not fork, because this process may hold threads of torch and of the tokenizers library.
    context = multiprocessing.get_context("spawn")
    waiting: deque[tuple[int, Future[ExampleBatch]]] = deque()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, preparation))
    try:
        for task in tasks:
            waiting.append((task.size, pool.submit(_run_in_worker, task)))
            while len(waiting) >= workers * _CHUNKS_AHEAD or _bytes_of(waiting) > _BYTES_AHEAD:
                yield waiting.popleft()[1].result()
        while waiting:
            yield waiting.popleft()[1].result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} processes that prepare the data ended (too little memory?); try fewer "
            "with --data-workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _bytes_of(waiting: Iterable[tuple[int, Future[ExampleBatch]]]) -> int:
    return sum(size for size, _ in waiting)


# The worker of a child process.
_worker: _Worker | None = None


def _start_worker(tokenizer: Path, preparation: Preparation) -> None:
    global _worker
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = _Worker(_load_renderer(tokenizer, preparation), preparation)


def _run_in_worker(task: Task) -> ExampleBatch:
    assert _worker is not None, "the pool starts it"
    return _worker(task)


@dataclass(frozen=True)
class _Worker:
    """Makes examples of raw records."""

    renderer: ChatRenderer
    preparation: Preparation

    def __call__(self, task: Task) -> ExampleBatch:
        parts, talks = _Parts(task), []
        for record in task.records:
            try:
                talks.append((record, normalise(record, task.layout)))
            except DataError as error:
                return _Parts(task).chunk(refused=str(error))
            except BrokenRecord as error:
                parts.skip(record, error)
        for (record, talk), examples in zip(talks, self._examples(talks), strict=True):
            parts.unread.update(talk.unread)
            try:
                parts.add(record, talk, examples)
            except BrokenRecord as error:
                parts.skip(record, error)
        return parts.chunk()

    def _examples(
        self, talks: Sequence[tuple[RawRecord, Conversation]]
    ) -> list[list[_Example | BrokenRecord]]:
        """Return the examples of each record, or why there are none."""
        talks_of = [self.renderer.training.examples(talk) for _, talk in talks]
        # Whole examples, and what the tokenizer notes on them, are held for one batch at a time; the parts
        # that fit into a row are held for the whole task.
        largest = max((record.size for record, _ in talks), default=0)
        count = max(1, min(CHUNK_RECORDS, CHUNK_BYTES // max(1, largest)))
        batches = itertools.batched(itertools.chain(*talks_of), count)
        rendered = itertools.chain.from_iterable(map(self.renderer.render_all, batches))
        return [[self._cut(next(rendered)) for _ in inner] for inner in talks_of]

    def _cut(self, whole: RenderedConversation | BrokenRecord) -> _Example | BrokenRecord:
        """Return the part that fits into a row; an `_Unusable` if no token of that part is trained."""
        if isinstance(whole, BrokenRecord):
            return whole
        seq_length, length = self.preparation.seq_length, len(whole.ids)
        if length > seq_length + 1 and self.preparation.too_long == "drop":
            return _Unusable(TOO_LONG, f"{length} tokens, a row takes {seq_length + 1}")
        if not whole.supervised[1:].any():
            return _Unusable(
                NOTHING_TRAINED, "the weight of its turns is 0, or they are not chosen"
            )
        kept = slice(seq_length + 1)
        example = _Example(
            whole.ids[kept].copy(), whole.supervised[kept].copy(), length, whole.findings
        )
        if not example.supervised[1:].any():
            return _Unusable(
                NOTHING_SUPERVISED,
                f"the record has {length} tokens, the sequence length is {seq_length}",
            )
        return example


class _Unusable(BrokenRecord):
    """An example has no trained token left; another example of its record may be used."""


@dataclass(frozen=True, slots=True)
class _Example:
    """Ids and mask of an example after truncation, its `length` before, and its findings."""

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    length: int
    findings: Mapping[str, Finding]


class _Parts:
    """The parts of a chunk, which grow record by record."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._examples: list[_Example] = []
        self._numbers: list[int] = []
        self._digests: list[int] = []
        self._skipped: list[tuple[str, str, str]] = []
        self._truncated: list[str] = []
        self._found: dict[str, Found] = {}
        self.unread: Counter[str] = Counter()

    def skip(self, record: RawRecord, error: BrokenRecord) -> None:
        """Leave a record out."""
        self._skipped.append((record.where, error.reason, error.detail))

    def add(
        self, record: RawRecord, talk: Conversation, cut: Sequence[_Example | BrokenRecord]
    ) -> None:
        """Keep the remaining parts of the examples of a record.

        Raises:
            BrokenRecord: One is broken, or none is left.
        """
        for example in cut:
            if isinstance(example, BrokenRecord) and not isinstance(example, _Unusable):
                raise example
        examples = [example for example in cut if isinstance(example, _Example)]
        gone = [example for example in cut if isinstance(example, _Unusable)]
        if not examples:
            raise gone[0] if gone else _Unusable(NOTHING_TRAINED, "the weight of its turns is 0")
        digest = _digest(examples)
        for example in examples:
            self._examples.append(example)
            self._numbers.append(record.number)
            self._digests.append(digest)
            if len(example.ids) < example.length:
                self._truncated.append(record.where)
            found = {**example.findings, NULLS_LEFT_OUT: Finding(int(talk.nulls))}
            self._find(record, found)
        # Only where each turn has an example of its own can some of them be kept and others not.
        detail = gone[0].detail if gone else ""
        self._find(record, {TURNS_LEFT_OUT: Finding(len(gone), len(cut), "turns", detail)})

    def _find(self, record: RawRecord, findings: Mapping[str, Finding]) -> None:
        for name, finding in findings.items():
            self._found.setdefault(name, Found(finding.unit)).add(finding, record.where)

    def chunk(self, refused: str = "") -> ExampleBatch:
        """Return all of it."""
        ids = [example.ids for example in self._examples]
        supervised = [example.supervised for example in self._examples]
        return ExampleBatch(
            source=self._task.source,
            file=self._task.file,
            read=len(self._task.records),
            ids=np.concatenate(ids or [np.zeros(0, np.int32)]),
            supervised=np.concatenate(supervised or [np.zeros(0, bool)]).astype(np.uint8),
            lengths=[len(example.ids) for example in self._examples],
            whole=[example.length for example in self._examples],
            numbers=self._numbers,
            digests=self._digests,
            labels=[int(example.supervised[1:].sum()) for example in self._examples],
            skipped=self._skipped,
            truncated=self._truncated,
            unread=dict(self.unread),
            found=self._found,
            refused=refused,
        )


def _load_renderer(tokenizer: Path, preparation: Preparation) -> ChatRenderer:
    return ChatRenderer(
        load_tokenizer(tokenizer),
        preparation.training,
        preparation.day,
        preparation.allowed_tokens,
    )


def _digest(examples: Sequence[_Example]) -> int:
    """Return one number for all examples of a record, so that all of them are set aside or none is."""
    digest = blake2b(digest_size=8)
    for example in examples:
        digest.update(example.ids.tobytes())
    return int.from_bytes(digest.digest(), "little")


class _Ticker:
    """Prints the progress of the preparation, at most every PROGRESS_SECONDS."""

    def __init__(self, progress: Callable[[str], None] | None, report: DataReport) -> None:
        self._progress, self._report = progress, report
        self._start = self._told = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if self._progress is None or now - self._told < PROGRESS_SECONDS:
            return
        self._told = now
        report, rate = self._report, self._report.read / max(now - self._start, 1e-9)
        self._progress(
            f"preparing data: {report.read:,} records read, {report.kept:,} kept, "
            f"{report.total_tokens:,} tokens, {rate:,.0f} records/s"
        )
