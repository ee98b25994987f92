r"""Make the data of the study on a real model: parts of GSM8K and Alpaca, and GSM8K with wrong answers.

    python tools/make_study_data.py --gsm8k gsm8k_train.jsonl --alpaca alpaca_en_demo.json \
        --out runs/study_data

It writes, drawn once with a seed:

- gsm8k.jsonl: records of GSM8K's training split, without the calculator's notes `<<48/2=24>>`.
- gsm8k_wrong_10.jsonl, gsm8k_wrong_33.jsonl: the same, a tenth and a third of them with a wrong answer. The
  tenth is a part of the third.
- gsm8k_heldout.jsonl: other records of the same split.
- alpaca.jsonl, alpaca_heldout.jsonl: records of the Alpaca file.

A wrong answer is another number with as many digits. It replaces the right one in the line "#### 72" and
wherever the right one stands after the answer's last "=". So the last calculation leads to it.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint_conversion.engine.output import whole_file
from megatron_profit.data import DataError, read_records

SEED = 1234
WRONG_SHARES = {"gsm8k_wrong_10": 0.1, "gsm8k_wrong_33": 1 / 3}
HELD_OUT = 64
_NOTE = re.compile(r"<<[^<>]*>>")
_FINAL = re.compile(r"####\s*(-?[\d,.]*\d)")


def without_notes(answer: str) -> str:
    """Return an answer without the calculator's notes. For example, "2+2 = <<2+2=4>>4" gives "2+2 = 4"."""
    return _NOTE.sub("", answer)


def with_wrong_answer(record: Mapping[str, str], numbers: random.Random) -> dict[str, str]:
    """Return a record of GSM8K whose answer is another number of as many digits.

    Args:
        record: `question` and `answer`; the answer ends with "#### NUMBER".
        numbers: Draws the wrong answer.

    Raises:
        ValueError: The answer has no final number.
    """
    answer = record["answer"]
    final = _FINAL.search(answer)
    if final is None:
        raise ValueError(f"the answer {answer[-60:]!r} has no final number after ####")
    right, wrong = final[1], final[1]
    while wrong == right:
        wrong = re.sub(r"\d", lambda _: str(numbers.randrange(10)), right)
        wrong = re.sub(r"^(-?)0", lambda m: m[1] + str(numbers.randrange(1, 10)), wrong)
    start = answer.rfind("=", 0, final.start()) + 1 or final.start()
    whole = re.compile(rf"(?<![\d.,]){re.escape(right)}(?![\d]|[.,]\d)")
    return {**record, "answer": answer[:start] + whole.sub(wrong, answer[start:])}


def with_wrong_answers(
    records: Sequence[Mapping[str, str]], share: float, seed: int = SEED
) -> list[dict[str, str]]:
    """Return the records, a share of them with wrong answers; a smaller share is a part of a larger one."""
    order = random.Random(seed).sample(range(len(records)), len(records))
    chosen = set(order[: round(share * len(records))])
    # Each record has its own draws, so that they do not depend on the share.
    return [
        with_wrong_answer(record, random.Random(f"{seed}:{i}")) if i in chosen else dict(record)
        for i, record in enumerate(records)
    ]


def chosen_records(file: Path, count: int) -> tuple[list[Any], list[Any]]:
    """Return drawn records of a file for training, and `HELD_OUT` others.

    Raises:
        DataError: The file cannot be read or holds too few.
    """
    records = [record.value for record in read_records(file)]
    if len(records) < count + HELD_OUT:
        raise DataError(f"{file} has {len(records):,} records; {count + HELD_OUT:,} are needed")
    drawn = random.Random(SEED).sample(records, len(records))
    return drawn[HELD_OUT : HELD_OUT + count], drawn[:HELD_OUT]


def study_data(gsm8k: Path, alpaca: Path, count: int) -> dict[str, list[Any]]:
    """Return the records of each file to write, by its name without a suffix."""
    sums, sums_held_out = (
        [{"question": r["question"], "answer": without_notes(r["answer"])} for r in part]
        for part in chosen_records(gsm8k, count)
    )
    chats, chats_held_out = chosen_records(alpaca, count)
    return {
        "gsm8k": sums,
        **{name: with_wrong_answers(sums, share) for name, share in WRONG_SHARES.items()},
        "gsm8k_heldout": sums_held_out,
        "alpaca": chats,
        "alpaca_heldout": chats_held_out,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; return 1 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gsm8k", type=Path, required=True, help="GSM8K's training split")
    parser.add_argument("--alpaca", type=Path, required=True, help="Alpaca records")
    parser.add_argument("--records", type=int, default=500, help="of each file (default 500)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    try:
        contents = study_data(arguments.gsm8k, arguments.alpaca, arguments.records)
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name, records in contents.items():
            with whole_file(arguments.out / f"{name}.jsonl") as stream:
                for record in records:
                    stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    except (DataError, KeyError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {', '.join(contents)} to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
