"""What became of the records: counts, reasons, places, lengths. Text for people, JSON for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_profit.data.errors import printable, shown
from megatron_profit.data.order import RowOrder

# In the JSON, of each kind; and in the text.
_PLACES_KEPT = 10_000
_PLACES_SHOWN = 5
# Names of fields: some files have a key of its own in every record.
_FIELDS_KEPT = 1_000
_FIELDS_SHOWN = 12
_BAR = 40
# Beside the attributes of a report in its JSON.
_SUMS = ("read", "kept", "total_tokens", "supervised_tokens")


@dataclass(slots=True)
class Skipped:
    """Records left out for one reason: how many, where the first 10,000 are, and what was found in the
    first."""

    detail: str
    count: int = 0
    places: list[str] = field(default_factory=list)


@dataclass(slots=True)
class SourceCounts:
    """What became of the records of one source.

    Attributes:
        path: File or folder.
        read: Records in the files.
        kept: Examples made of them.
        total_tokens: Ids of the kept examples, after truncation.
        supervised_tokens: Labels that are trained where every example comes once.
    """

    path: str
    read: int = 0
    kept: int = 0
    total_tokens: int = 0
    supervised_tokens: int = 0

    def add(self, read: int, lengths: Sequence[int], labels: Sequence[int]) -> None:
        """Counts `read` records, and the examples made of them by their ids and their trained labels."""
        self.read += read
        self.kept += len(lengths)
        self.total_tokens += sum(lengths)
        self.supervised_tokens += sum(labels)

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.read:,} read, {self.kept:,} kept, {self.total_tokens:,} tokens, "
            f"{self.supervised_tokens:,} supervised"
        )


@dataclass(slots=True)
class PreparationReport:
    """What became of the records.

    Attributes:
        sources: What became of the records of each source; `read`, `kept`, `total_tokens` and
            `supervised_tokens` are sums over them.
        skipped: Reason -> the records left out for it; read = kept + the sum of their counts.
        truncated: Kept examples of which the end was cut off.
        truncated_places: Where the first 10,000 of them are.
        unread: Field that nothing reads -> usable records that have it, of the first 1,000 such fields; those
            of messages as "messages.NAME".
        longest: Ids of the longest usable record, before truncation.
        lengths: Examples by length after truncation: entry k counts those of 2^k to 2^(k + 1) - 1 ids.
    """

    sources: list[SourceCounts] = field(default_factory=list)
    skipped: dict[str, Skipped] = field(default_factory=dict)
    truncated: int = 0
    truncated_places: list[str] = field(default_factory=list)
    longest: int = 0
    lengths: list[int] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)

    @property
    def read(self) -> int:
        return sum(source.read for source in self.sources)

    @property
    def kept(self) -> int:
        return sum(source.kept for source in self.sources)

    @property
    def total_tokens(self) -> int:
        return sum(source.total_tokens for source in self.sources)

    @property
    def supervised_tokens(self) -> int:
        return sum(source.supervised_tokens for source in self.sources)

    def skip(self, place: str, reason: str, detail: str) -> None:
        """Counts a record that is left out."""
        skipped = self.skipped.setdefault(reason, Skipped(detail))
        skipped.count += 1
        if len(skipped.places) < _PLACES_KEPT:
            skipped.places.append(place)

    def leave_unread(self, counts: Mapping[str, int]) -> None:
        """Counts the records that have each field that nothing reads."""
        for name, count in counts.items():
            if name in self.unread or len(self.unread) < _FIELDS_KEPT:
                self.unread[name] = self.unread.get(name, 0) + count

    def keep(self, lengths: Sequence[int], whole: Sequence[int], truncated: Sequence[str]) -> None:
        """Notes the lengths of examples, which had `whole` ids before truncation.

        `truncated` are the places of those that lost some.
        """
        self.truncated += len(truncated)
        self.truncated_places += truncated[: _PLACES_KEPT - len(self.truncated_places)]
        self.longest = max(self.longest, *whole)
        for length in lengths:
            bucket = length.bit_length() - 1
            self.lengths += [0] * (bucket + 1 - len(self.lengths))
            self.lengths[bucket] += 1

    def under(self, paths: Mapping[str, str]) -> "PreparationReport":
        """The report with places under other paths: of each source the one it was read under -> another."""
        if all(old == new for old, new in paths.items()):
            return self
        # The longest first: one may be a folder that holds another.
        olds = sorted(paths, key=len, reverse=True)

        def moved(place: str) -> str:
            old = next((old for old in olds if place.startswith(old)), "")
            return paths.get(old, "") + place.removeprefix(old)

        skipped = {
            reason: Skipped(moved(found.detail), found.count, [moved(p) for p in found.places])
            for reason, found in self.skipped.items()
        }
        truncated = [moved(place) for place in self.truncated_places]
        sources = [replace(source, path=moved(source.path)) for source in self.sources]
        return replace(self, skipped=skipped, truncated_places=truncated, sources=sources)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values; `from_json` reads them."""
        return {name: getattr(self, name) for name in _SUMS} | asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "PreparationReport":
        skipped = {reason: Skipped(**found) for reason, found in value["skipped"].items()}
        sources = [SourceCounts(**counts) for counts in value["sources"]]
        own = {name: item for name, item in value.items() if name not in _SUMS}
        return cls(**{**own, "skipped": skipped, "sources": sources})

    def __str__(self) -> str:
        share = self.supervised_tokens / max(self.total_tokens, 1)
        lines = [
            f"{self.read:,} records read, {self.kept:,} kept, {self.read - self.kept:,} skipped, "
            f"{self.truncated:,} truncated",
            f"{self.total_tokens:,} tokens, {self.supervised_tokens:,} of them supervised "
            f"({share:.1%}); the longest record has {self.longest:,}",
            *self.histogram(),
            *(map(str, self.sources) if len(self.sources) > 1 else ()),
        ]
        for reason, skipped in self.skipped.items():
            lines.append(f"skipped {skipped.count:,}: {reason} ({_first(skipped.places)})")
            lines.append(f"  the first: {skipped.detail}")
        if self.unread:
            lines.append(f"fields that nothing reads, and records with them: {self._unread()}")
        return "\n".join(map(printable, lines))

    def _unread(self) -> str:
        most = sorted(self.unread.items(), key=lambda item: (-item[1], item[0]))
        named = [f"{shown(name)} {count:,}" for name, count in most[:_FIELDS_SHOWN]]
        return ", ".join(named + [f"{len(most) - len(named):,} more"] * (len(most) > len(named)))

    def histogram(self) -> list[str]:
        """The lengths as lines of text, a bar for each power of two."""
        first = next((k for k, count in enumerate(self.lengths) if count), 0)
        most = max(self.lengths, default=1)
        return [
            f"{2**k:>9,} to {2 ** (k + 1) - 1:>9,} tokens {count:>10,} "
            f"{'#' * -(-count * _BAR // most)}".rstrip()
            for k, count in enumerate(self.lengths)
            if k >= first
        ]


def _first(places: Sequence[str]) -> str:
    more = ", ..." if len(places) > _PLACES_SHOWN else ""
    return "; ".join(places[:_PLACES_SHOWN]) + more


@dataclass(frozen=True)
class PackingReport:
    """How full the rows of the first epoch are.

    Attributes:
        examples: Examples in the epoch.
        rows: Rows of `seq_length` positions.
        seq_length: Positions of a row.
        tokens: Positions that hold an example.
        supervised: Those among them whose label is trained.
    """

    examples: int
    rows: int
    seq_length: int
    tokens: int
    supervised: int

    @classmethod
    def of(
        cls,
        order: RowOrder,
        positions: npt.NDArray[np.integer],
        labels: npt.NDArray[np.integer],
        seq_length: int,
    ) -> "PackingReport":
        """Counts the first epoch; `positions` and `labels` [N] are those of `Examples`."""
        drawn, rows = order.first_epoch()
        tokens, supervised = (int(counts[drawn].sum()) for counts in (positions, labels))
        return cls(len(drawn), rows, seq_length, tokens, supervised)

    @property
    def efficiency(self) -> float:
        """The share of all positions that holds an example."""
        return self.tokens / max(self.rows * self.seq_length, 1)

    @property
    def supervised_share(self) -> float:
        """The share of the filled positions that is trained."""
        return self.supervised / max(self.tokens, 1)

    def as_json(self) -> dict[str, Any]:
        shares = {"efficiency": self.efficiency, "supervised_share": self.supervised_share}
        return {**asdict(self), **shares}

    def __str__(self) -> str:
        return (
            f"an epoch is {self.examples:,} examples in {self.rows:,} rows of {self.seq_length:,} "
            f"positions, {self.efficiency:.1%} of them filled and {self.supervised_share:.1%} of these "
            "supervised"
        )
