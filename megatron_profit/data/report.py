"""The report on the records: counts, reasons, places, lengths. Text for people, JSON for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from checkpoint_conversion.errors import escaped, warning
from megatron_profit.data.errors import shown

# The number of places of each kind in the JSON; and in the text.
_PLACES_KEPT = 10_000
_PLACES_SHOWN = 5
# The number of names of fields: some files have a different key in every record.
_FIELDS_KEPT = 1_000
_FIELDS_SHOWN = 12
_BAR = 40
# The JSON's keys besides the attributes of a report.
_SUMS = ("read", "kept", "examples", "total_tokens", "supervised_tokens")


@dataclass(slots=True)
class Skipped:
    """Records left out for one reason.

    Their number, the places of the first 10,000, and the finding in the first.
    """

    detail: str
    count: int = 0
    places: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Finding:
    """A property of an example that is counted and does not keep the example from being trained.

    Attributes:
        count: Number of times that it was found, 0 for none.
        of: Number of times that it could have been found.
        unit: Name of the things that are counted.
        detail: The finding in words.
    """

    count: int
    of: int = 1
    unit: str = "examples"
    detail: str = ""


@dataclass(slots=True)
class Found:
    """A finding summed over examples.

    Attributes:
        count, of, unit: As in `Finding`.
        detail: The first finding in words.
        places: Places of the first 10,000.
    """

    unit: str
    count: int = 0
    of: int = 0
    detail: str = ""
    places: list[str] = field(default_factory=list)

    def add(self, finding: Finding, place: str) -> None:
        """Count a finding of the record at this place."""
        self.merge(Found(self.unit, finding.count, finding.of, finding.detail, [place]))

    def merge(self, other: "Found") -> None:
        """Count what was found in later records."""
        self.of += other.of
        if other.count:
            self.detail = self.detail if self.count else other.detail
            self.count += other.count
            new = [place for place in other.places if place not in self.places[-1:]]
            self.places += new[: _PLACES_KEPT - len(self.places)]


@dataclass(slots=True)
class SourceCounts:
    """Counts of the records of one source.

    Attributes:
        path: File or folder.
        read: Records in the files.
        kept: Records of which examples were made.
        examples: Examples of these records: one for each record, unless each turn is trained in its own
            example.
        total_tokens: Ids of the kept examples, after truncation.
        supervised_tokens: Labels that are trained where every example comes once.
    """

    path: str
    read: int = 0
    kept: int = 0
    examples: int = 0
    total_tokens: int = 0
    supervised_tokens: int = 0

    def add(self, read: int, kept: int, lengths: Sequence[int], labels: Sequence[int]) -> None:
        """Count `read` records, and the examples made of `kept` ones by their ids and trained labels."""
        self.read += read
        self.kept += kept
        self.examples += len(lengths)
        self.total_tokens += sum(lengths)
        self.supervised_tokens += sum(labels)

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.read:,} read, {self.kept:,} kept, {self.total_tokens:,} tokens, "
            f"{self.supervised_tokens:,} supervised"
        )


@dataclass(slots=True)
class DataReport:
    """The counts of all records.

    Attributes:
        sources: The counts of each source; `read`, `kept`, `examples`, `total_tokens` and
            `supervised_tokens` are sums over them.
        skipped: Reason -> the records left out for it; read = kept + the sum of their counts.
        truncated: Kept examples of which the end was cut off.
        truncated_places: Places of the first 10,000 of them.
        unread: Unread field -> usable records that have it, for the first 1,000 such fields. A field of
            messages is called "messages.NAME".
        found: Findings in the examples, by name.
        longest: Ids of the longest usable record, before truncation.
        lengths: Examples by length after truncation: entry k counts examples of 2^k to 2^(k + 1) - 1 ids. For
            example, entry 10 counts 1,024 to 2,047 ids.
        turn_end_id: Id of the token that ends the assistant's turns, as training teaches it; None where the
            chat template ends them in ordinary text.
    """

    sources: list[SourceCounts] = field(default_factory=list)
    skipped: dict[str, Skipped] = field(default_factory=dict)
    truncated: int = 0
    truncated_places: list[str] = field(default_factory=list)
    longest: int = 0
    lengths: list[int] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)
    found: dict[str, Found] = field(default_factory=dict)
    turn_end_id: int | None = None

    @property
    def read(self) -> int:
        return sum(source.read for source in self.sources)

    @property
    def kept(self) -> int:
        return sum(source.kept for source in self.sources)

    @property
    def examples(self) -> int:
        return sum(source.examples for source in self.sources)

    @property
    def total_tokens(self) -> int:
        return sum(source.total_tokens for source in self.sources)

    @property
    def supervised_tokens(self) -> int:
        return sum(source.supervised_tokens for source in self.sources)

    def skip(self, place: str, reason: str, detail: str) -> None:
        """Count a record that is left out."""
        skipped = self.skipped.setdefault(reason, Skipped(detail))
        skipped.count += 1
        if len(skipped.places) < _PLACES_KEPT:
            skipped.places.append(place)

    def leave_unread(self, counts: Mapping[str, int]) -> None:
        """Count the records that have each unread field."""
        for name, count in counts.items():
            if name in self.unread or len(self.unread) < _FIELDS_KEPT:
                self.unread[name] = self.unread.get(name, 0) + count

    def find(self, found: Mapping[str, Found]) -> None:
        """Count findings in examples."""
        for name, more in found.items():
            self.found.setdefault(name, Found(more.unit)).merge(more)

    def keep(self, lengths: Sequence[int], whole: Sequence[int], truncated: Sequence[str]) -> None:
        """Count the lengths of examples, which had `whole` ids before truncation.

        `truncated` are the places of the examples that lost some.
        """
        self.truncated += len(truncated)
        self.truncated_places += truncated[: _PLACES_KEPT - len(self.truncated_places)]
        self.longest = max(self.longest, *whole)
        for length in lengths:
            bucket = length.bit_length() - 1
            self.lengths += [0] * (bucket + 1 - len(self.lengths))
            self.lengths[bucket] += 1

    def under(self, paths: Mapping[str, str]) -> "DataReport":
        """Return the report with the places under other paths.

        Args:
            paths: Path of each source in this report -> its other path.
        """
        if all(old == new for old, new in paths.items()):
            return self
        # The longest first, because one may be a folder that holds another.
        olds = sorted(paths, key=len, reverse=True)

        def moved(place: str) -> str:
            old = next((old for old in olds if place.startswith(old)), "")
            return paths.get(old, "") + place.removeprefix(old)

        skipped = {
            reason: Skipped(moved(found.detail), found.count, [moved(p) for p in found.places])
            for reason, found in self.skipped.items()
        }
        found = {
            name: replace(more, places=[moved(place) for place in more.places])
            for name, more in self.found.items()
        }
        truncated = [moved(place) for place in self.truncated_places]
        sources = [replace(source, path=moved(source.path)) for source in self.sources]
        return replace(
            self, skipped=skipped, found=found, truncated_places=truncated, sources=sources
        )

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values; `from_json` reads them."""
        return {name: getattr(self, name) for name in _SUMS} | asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "DataReport":
        skipped = {reason: Skipped(**found) for reason, found in value["skipped"].items()}
        found = {name: Found(**counts) for name, counts in value["found"].items()}
        sources = [SourceCounts(**counts) for counts in value["sources"]]
        own = {name: item for name, item in value.items() if name not in _SUMS}
        return cls(**{**own, "skipped": skipped, "found": found, "sources": sources})

    def __str__(self) -> str:
        share = self.supervised_tokens / max(self.total_tokens, 1)
        examples = f" as {self.examples:,} examples" if self.examples != self.kept else ""
        lines = [
            f"{self.read:,} records read, {self.kept:,} kept{examples}, {self.read - self.kept:,} skipped, "
            f"{self.truncated:,} truncated",
            f"{self.total_tokens:,} tokens, {self.supervised_tokens:,} of them supervised "
            f"({share:.1%}); the longest record has {self.longest:,}",
            *self.histogram(),
            *(map(str, self.sources) if len(self.sources) > 1 else ()),
        ]
        for reason, skipped in self.skipped.items():
            lines.append(f"skipped {skipped.count:,}: {reason} ({_first(skipped.places)})")
            lines.append(f"  the first: {skipped.detail}")
        for name, found in self.found.items():
            if found.count:
                share_of = f"{found.count:,} of {found.of:,} {found.unit}"
                lines.append(warning(f"{name}: {share_of} ({_first(found.places)})"))
            if found.count and found.detail:
                lines.append(f"  the first: {found.detail}")
        if self.unread:
            lines.append(f"fields that nothing reads, and records with them: {self._unread()}")
        return "\n".join(map(escaped, lines))

    def _unread(self) -> str:
        most = sorted(self.unread.items(), key=lambda item: (-item[1], item[0]))
        named = [f"{shown(name)} {count:,}" for name, count in most[:_FIELDS_SHOWN]]
        return ", ".join(named + [f"{len(most) - len(named):,} more"] * (len(most) > len(named)))

    def histogram(self) -> list[str]:
        """Return the lengths as lines of text, a bar for each power of two."""
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
