"""Generate the chat data of the quickstart: sums in words, asked and answered in many ways.

    python tools/make_arithmetic_data.py                 # writes examples/data/arithmetic_*.jsonl
    python tools/make_arithmetic_data.py --check         # compares them with the files that it would write

    What is sixty-two plus thirty-six?  ->  No problem. You get ninety-eight. Anything else?

Every answer holds one fact, the sum, in a wording that could have been another. A few tokens matter
among many that are only a manner of speaking. ProFit tells the two apart by how probable the model
finds them. There are three files, with one chat record {"messages": [user, assistant]} per line:

- `arithmetic_base.jsonl`: mostly plain answers. Supervised fine-tuning on it makes the base model.
  A model with random weights finds every token improbable, and ProFit would train none of them.
- `arithmetic_chatty.jsonl`: other sums, most answered with an opening and a closing. The base model
  met each opening and closing in 3 or 4 answers of a hundred. So ProFit drops the tokens that begin
  one and keeps the sums.
- `arithmetic_heldout.jsonl`: like the chatty file, for evaluation only.

A number has a tens word and a units word, twenty-one to ninety-nine. The sums are all pairs that add
without a carry. Every unordered pair belongs to one file, in either order and in any wording, so no
held-out sum was ever seen in training. Each column does recur: for example, "four" and "three" give
"seven". So the held-out file measures whether a model adds the columns, which recalling whole answers
cannot do. The best constant answer is right for 7 of its 64 questions. Numbers are in words because
tens and units are then different tokens. Half a million weights learn to add them within a minute on a
CPU.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoint_conversion.cli import FlagHelp

DATA_DIR = Path(__file__).resolve().parent.parent / "examples" / "data"

TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBER = re.compile(rf"({'|'.join(TENS)})-({'|'.join(UNITS)})", re.IGNORECASE)

QUESTIONS = (
    "What is {a} plus {b}?",
    "How much is {a} plus {b}?",
    "What do {a} and {b} make?",
    "Add {a} and {b}.",
    "Compute {a} plus {b}.",
    "Find the sum of {a} and {b}.",
)
ANSWERS = (
    "The sum is {c}.",
    "The answer is {c}.",
    "It is {c}.",
    "That makes {c}.",
    "You get {c}.",
    "So {a} plus {b} is {c}.",
)
OPENINGS = (
    "Sure!",
    "Of course.",
    "Good question!",
    "Gladly.",
    "No problem.",
    "Okay.",
    "Right.",
    "Let me see.",
)
CLOSINGS = ("Anything else?", "All done!", "Easy!", "You see?", "Next one?")


@dataclass(frozen=True)
class Split:
    """The recipe of one file."""

    pairs: int  # unordered pairs of numbers that belong to this file alone
    wordings: int  # records of each pair
    opening_share: float  # share of the answers that begin with one of OPENINGS
    closing_share: float  # share of the answers that end with one of CLOSINGS


SPLITS = {
    "arithmetic_base": Split(pairs=200, wordings=3, opening_share=0.25, closing_share=0.2),
    "arithmetic_chatty": Split(pairs=120, wordings=3, opening_share=0.75, closing_share=0.75),
    "arithmetic_heldout": Split(pairs=64, wordings=1, opening_share=0.75, closing_share=0.75),
}


def number_words(number: int) -> str:
    """Return a number's words: 21 -> "twenty-one", for numbers to 99 with a tens word and a units word."""
    tens, units = divmod(number, 10)
    if not (2 <= tens <= 9 and units):
        raise ValueError(f"{number} is not written with a tens word and a units word")
    return f"{TENS[tens - 2]}-{UNITS[units - 1]}"


def numbers_in(text: str) -> list[int]:
    """Return the numbers that a text mentions, in order; the last one of an answer is its sum."""
    return [
        10 * (TENS.index(tens.lower()) + 2) + UNITS.index(units.lower()) + 1
        for tens, units in NUMBER.findall(text)
    ]


def carry_free_pairs() -> list[tuple[int, int]]:
    """Return all (a, b), a <= b, whose tens and whose units each sum to at most 9."""
    numbers = [10 * tens + units for tens in range(2, 10) for units in range(1, 10)]
    return [
        (a, b)
        for a in numbers
        for b in numbers
        if a <= b and a // 10 + b // 10 <= 9 and a % 10 + b % 10 <= 9
    ]


def make_record(rng: random.Random, pair: tuple[int, int], split: Split) -> dict:
    """Make one question and its answer; the order of the numbers and the wording are drawn."""
    a, b = rng.sample(pair, 2)
    words = {"a": number_words(a), "b": number_words(b), "c": number_words(a + b)}
    parts = [rng.choice(ANSWERS).format(**words)]
    if rng.random() < split.opening_share:
        parts.insert(0, rng.choice(OPENINGS))
    if rng.random() < split.closing_share:
        parts.append(rng.choice(CLOSINGS))
    return _exchange(rng.choice(QUESTIONS).format(**words), " ".join(parts))


def generate(seed: int = 0) -> dict[str, list[dict]]:
    """Return the records of every file, by file stem; the same seed gives the same records."""
    rng = random.Random(seed)
    pairs = carry_free_pairs()
    rng.shuffle(pairs)
    files = {}
    for stem, split in SPLITS.items():
        own, pairs = pairs[: split.pairs], pairs[split.pairs :]
        records = [make_record(rng, pair, split) for pair in own for _ in range(split.wordings)]
        rng.shuffle(records)
        files[stem] = records
    return files


def in_other_words(records: Sequence[dict], wordings: int) -> list[dict]:
    """Ask each sum of the held-out file in `wordings` drawn wordings and orders, without repetitions."""
    rng = random.Random(0)
    split = SPLITS["arithmetic_heldout"]
    made: dict[str, dict] = {}
    for record in records:
        a, b = numbers_in(record["messages"][0]["content"])
        for _ in range(wordings):
            new = make_record(rng, (a, b), split)
            made.setdefault(new["messages"][0]["content"], new)
    return list(made.values())


def with_wrong_sums(records: Sequence[dict], share: float) -> list[dict]:
    """Copy the records, for experiments on wrong labels.

    A share of them has a sum with another units word.
    """
    rng = random.Random(0)
    made = []
    for record in records:
        question, answer = (message["content"] for message in record["messages"])
        if rng.random() < share:
            right = number_words(numbers_in(answer)[-1])
            tens, units = right.split("-")
            wrong = f"{tens}-{rng.choice([other for other in UNITS if other != units])}"
            answer = answer.replace(right, wrong)
        made.append(_exchange(question, answer))
    return made


def as_differences(records: Sequence[dict]) -> list[dict]:
    """Turn the sums a + b = c into questions for c - a, for experiments on skills not learnt yet.

    Each record gives one question. Records that differ only in wording give the same difference.
    """
    made = []
    for record in records:
        a, b = numbers_in(record["messages"][0]["content"])
        question = f"What is {number_words(a + b)} minus {number_words(a)}?"
        made.append(_exchange(question, f"The difference is {number_words(b)}."))
    return made


def _exchange(question: str, answer: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def render_files(out_dir: Path, seed: int) -> Iterator[tuple[Path, bytes]]:
    """Yield (path, content) of every file."""
    for stem, records in generate(seed).items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        yield out_dir / f"{stem}.jsonl", lines.encode()


def stale_files(out_dir: Path, seed: int) -> list[Path]:
    """Return the files that are missing or differ from the content that would be written."""
    return [
        path
        for path, content in render_files(out_dir, seed)
        if not path.is_file() or path.read_bytes() != content
    ]


def write_files(out_dir: Path, seed: int) -> list[Path]:
    """Write the files, replacing old ones, and return their paths."""
    out_dir.mkdir(parents=True, exist_ok=True)
    written = []
    for path, content in render_files(out_dir, seed):
        path.write_bytes(content)
        written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or check them; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=FlagHelp,
    )
    parser.add_argument("--out-dir", type=Path, default=DATA_DIR, help="folder of the files")
    parser.add_argument("--seed", type=int, default=0, help="seed of pairs, orders and wordings")
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    arguments = parser.parse_args(argv)
    if arguments.check:
        stale = stale_files(arguments.out_dir, arguments.seed)
        for path in stale:
            print(f"error: {path} is not what this script writes; run it again", file=sys.stderr)
        return 1 if stale else 0
    for path in write_files(arguments.out_dir, arguments.seed):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
