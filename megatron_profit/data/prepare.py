"""Files of chat records -> tokenised examples, by several processes where there is much to do.

The files are read here, in order; chunks of raw records are rendered and tokenised by the workers, and come
back in order, so that the result does not depend on their number.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import date
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from megatron_profit.data.chat import Conversation, normalise
from megatron_profit.data.errors import BrokenRecord, DataError
from megatron_profit.data.examples import Chunk, Examples, collect
from megatron_profit.data.records import RawRecord, read_records
from megatron_profit.data.render import ChatRenderer, RenderedConversation, Training
from megatron_profit.data.report import PreparationReport, SourceCounts
from megatron_profit.data.sources import Layout, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTHING_TRAINED = "no part of the record is to be trained"
NOTHING_SUPERVISED = "no supervised token is left within the sequence length"
TOO_LONG = "the record is longer than the sequence length"

PROGRESS_SECONDS = 2.0
_CHUNK_RECORDS = 128
# Below this, starting processes takes longer than the work.
_BYTES_PER_WORKER = 8 * 2**20
_CHUNKS_AHEAD = 4


@dataclass(frozen=True)
class Preparation:
    """How records become examples; with the files and the tokenizer it decides the result.

    Attributes:
        seq_length: Positions of a training row, at least 1. An example of L ids gives L - 1 pairs of token
            and label, so up to `seq_length` + 1 ids are kept.
        too_long: What happens to a record with more: it loses its end, or is left out and counted.
        training: Which parts of the assistant's turns are trained.
        day: What a chat template that writes today's date writes, None for other templates.
    """

    seq_length: int
    too_long: Literal["truncate", "drop"] = "truncate"
    training: Training = field(default_factory=Training)
    day: date | None = None

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise ValueError(f"seq_length must be at least 1, got {self.seq_length}")
        if self.too_long not in ("truncate", "drop"):
            raise ValueError(f"too_long is {self.too_long!r}; it must be truncate or drop")


def build_examples(
    files: str | Path | Sequence[str | Path],
    renderer: ChatRenderer,
    seq_length: int,
    *,
    progress: Callable[[str], None] | None = None,
) -> tuple[Examples, PreparationReport]:
    """Reads, normalises, renders and tokenises every record of the files, in memory and in this process.

    Args:
        files: Paths as in `read_records`.
        renderer: Renders and masks a conversation.
        seq_length: Positions of a training row.
        progress: Called with a line of text about every two seconds.

    Raises:
        ValueError: `seq_length` < 1.
        DataError: A file cannot be read, its first record is in no known format, or no record is usable.
    """
    names = [files] if isinstance(files, str | Path) else files
    sources = [Source(str(name)) for name in names]
    preparation = Preparation(seq_length, training=renderer.training)
    report = PreparationReport()
    chunks = prepared_chunks(sources, renderer, preparation, report, progress=progress)
    names = file_names([source.files() for source in sources])
    return collect(chunks, names, report).examples, report


def prepared_chunks(
    sources: Sequence[Source],
    renderer: ChatRenderer | Path,
    preparation: Preparation,
    report: PreparationReport,
    *,
    workers: int = 1,
    progress: Callable[[str], None] | None = None,
) -> Iterator[Chunk]:
    """The examples of all sources, in order, while `report` counts them.

    Args:
        sources: What to read.
        renderer: Renders and masks; or the folder of a tokenizer, from which each worker makes one.
        preparation: How records become examples.
        report: Complete when the chunks end.
        workers: Processes, where the folder of a tokenizer is given; 1 is this process.
        progress: Called with a line of text about every two seconds.

    Raises:
        DataError: A file cannot be read, its first record is in no known format, or no record is usable.
    """
    tell = _Ticker(progress, report)
    report.sources = [SourceCounts(source.path) for source in sources]
    for chunk in _chunks(_tasks(sources), renderer, preparation, workers):
        if chunk.refused:
            raise DataError(chunk.refused)
        report.sources[chunk.source].add(chunk.read, chunk.lengths, chunk.labels)
        for skipped in chunk.skipped:
            report.skip(*skipped)
        report.leave_unread(chunk.unread)
        if chunk.lengths:
            report.keep(chunk.lengths, chunk.whole, chunk.truncated)
            yield chunk
        tell()
    if not report.kept:
        raise DataError(f"no record can be used for training:\n{report}")


def file_names(files: Iterable[Sequence[Path]]) -> list[str]:
    """What `Prepared.file_names` holds, of the files of each source: as much of each path's end as tells all
    apart."""
    paths = [file.absolute() for inner in files for file in inner]
    for parts in itertools.count(1):
        names = [str(Path(*path.parts[-parts:])) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def default_workers(sources: Sequence[Source]) -> int:
    """As many processes as the data are worth, and not more than there are cores."""
    files = [file for source in sources for file in source.files()]
    size = sum(
        inner.stat().st_size
        for file in files
        for inner in (file.rglob("*") if file.is_dir() else [file])
    )
    return max(1, min(len(os.sched_getaffinity(0)), size // _BYTES_PER_WORKER))


@dataclass(frozen=True, slots=True)
class _Task:
    """Records of one file for a worker."""

    source: int
    file: int
    layout: Layout
    records: list[RawRecord]


def _tasks(sources: Sequence[Source]) -> Iterator[_Task]:
    # Every path is looked at before the first file is read.
    files = [source.files() for source in sources]
    numbers = itertools.count()
    for source_number, source in enumerate(sources):
        missing = set(source.layout.columns.values())
        for file, number in zip(files[source_number], numbers, strict=False):
            records = _noting_keys(read_records(file, source.split), missing)
            while batch := list(itertools.islice(records, _CHUNK_RECORDS)):
                yield _Task(source_number, number, source.layout, batch)
        if missing and not source.layout.optional >= missing:
            raise DataError(
                f"{source.path}: no record has the column {', '.join(sorted(missing))}; correct the "
                "names of the columns"
            )


def _noting_keys(records: Iterator[RawRecord], missing: set[str]) -> Iterator[RawRecord]:
    for record in records:
        if missing:
            missing.difference_update(record.value)
        yield record


def _chunks(
    tasks: Iterable[_Task], renderer: ChatRenderer | Path, preparation: Preparation, workers: int
) -> Iterator[Chunk]:
    if isinstance(renderer, ChatRenderer):
        yield from map(_Worker(renderer, preparation), tasks)
    elif workers == 1:
        yield from map(_Worker.load(renderer, preparation), tasks)
    else:
        yield from _parallel(tasks, renderer, preparation, workers)


def _parallel(
    tasks: Iterable[_Task], tokenizer: Path, preparation: Preparation, workers: int
) -> Iterator[Chunk]:
    # Not fork: this process may hold threads of torch and of the tokenizers library.
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[Chunk]] = deque()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, preparation))
    try:
        for task in tasks:
            waiting.append(pool.submit(_run_in_worker, task))
            if len(waiting) >= workers * _CHUNKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} processes that prepare the data ended (too little memory?); try fewer "
            "with --data-workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# The worker of a child process.
_worker: _Worker | None = None


def _start_worker(tokenizer: Path, preparation: Preparation) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = _Worker.load(tokenizer, preparation)


def _run_in_worker(task: _Task) -> Chunk:
    assert _worker is not None, "the pool starts it"
    return _worker(task)


@dataclass(frozen=True)
class _Worker:
    """Raw records to examples."""

    renderer: ChatRenderer
    preparation: Preparation

    @classmethod
    def load(cls, tokenizer: Path, preparation: Preparation) -> _Worker:
        renderer = ChatRenderer(load_tokenizer(tokenizer), preparation.training, preparation.day)
        return cls(renderer, preparation)

    def __call__(self, task: _Task) -> Chunk:
        outcomes: list[Conversation | BrokenRecord] = []
        for record in task.records:
            try:
                outcomes.append(normalise(record, task.layout))
            except DataError as error:
                return self._chunk(task, [], {}, refused=str(error))
            except BrokenRecord as error:
                outcomes.append(error)
        talks = [outcome for outcome in outcomes if isinstance(outcome, Conversation)]
        unread = Counter(name for talk in talks for name in talk.unread)
        return self._chunk(task, self._rendered(outcomes, talks), unread)

    def _rendered(
        self, outcomes: list[Conversation | BrokenRecord], talks: list[Conversation]
    ) -> list[RenderedConversation | BrokenRecord]:
        rendered = iter(self.renderer.render_all(talks))
        return [
            outcome if isinstance(outcome, BrokenRecord) else next(rendered) for outcome in outcomes
        ]

    def _chunk(
        self,
        task: _Task,
        outcomes: list[RenderedConversation | BrokenRecord],
        unread: dict[str, int],
        refused: str = "",
    ) -> Chunk:
        kept: list[tuple[RenderedConversation, int, int]] = []
        skipped, truncated = [], []
        for record, outcome in zip(task.records, outcomes, strict=False):
            try:
                if isinstance(outcome, BrokenRecord):
                    raise outcome
                example = self._cut(outcome)
                kept.append((example, len(outcome.ids), record.number))
                if len(example.ids) < len(outcome.ids):
                    truncated.append(record.where)
            except BrokenRecord as error:
                skipped.append((record.where, error.reason, error.detail))
        examples = [example for example, _, _ in kept]
        return Chunk(
            source=task.source,
            file=task.file,
            read=len(task.records),
            ids=np.concatenate([e.ids for e in examples] or [np.zeros(0, np.int32)]),
            supervised=np.concatenate(
                [e.supervised for e in examples] or [np.zeros(0, bool)]
            ).astype(np.uint8),
            lengths=[len(e.ids) for e in examples],
            whole=[whole for _, whole, _ in kept],
            numbers=[number for _, _, number in kept],
            digests=[_digest(e) for e in examples],
            labels=[int(e.supervised[1:].sum()) for e in examples],
            skipped=skipped,
            truncated=truncated,
            unread=unread,
            refused=refused,
        )

    def _cut(self, whole: RenderedConversation) -> RenderedConversation:
        """The example that a record gives.

        Raises:
            BrokenRecord: It is too long and to be dropped, or nothing in it is trained.
        """
        seq_length, length = self.preparation.seq_length, len(whole.ids)
        if length > seq_length + 1 and self.preparation.too_long == "drop":
            raise BrokenRecord(TOO_LONG, f"{length} tokens, a row takes {seq_length + 1}")
        kept = slice(seq_length + 1)
        example = RenderedConversation(whole.ids[kept], whole.supervised[kept])
        if not whole.supervised[1:].any():
            raise BrokenRecord(
                NOTHING_TRAINED, "the weight of its turns is 0, or they are not chosen"
            )
        if not example.supervised[1:].any():
            raise BrokenRecord(
                NOTHING_SUPERVISED,
                f"the record has {length} tokens, the sequence length is {seq_length}",
            )
        return example


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a HuggingFace folder.

    Raises:
        DataError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name one with a tokenizer and a chat template")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise DataError(f"{folder}: its tokenizer cannot be loaded: {error}") from error


def _digest(example: RenderedConversation) -> int:
    return int.from_bytes(blake2b(example.ids.tobytes(), digest_size=8).digest(), "little")


class _Ticker:
    """Tells at most every PROGRESS_SECONDS how far the preparation is."""

    def __init__(self, progress: Callable[[str], None] | None, report: PreparationReport) -> None:
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
