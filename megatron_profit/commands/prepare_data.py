"""Prepare data as training does, and report on their content. Training then finds them in the cache.

    megatron-profit data --hf-model Qwen3-0.6B --data chats.jsonl --seq-length 8192

The flags are the same as for training. `--report FILE` writes the report as JSON; `--show N` prints the first
N examples, with the trained parts between ⟦ and ⟧.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint_conversion.cli import FlagHelp
from checkpoint_conversion.engine.output import whole_file
from checkpoint_conversion.errors import escaped, warning
from megatron_profit.data import (
    BuiltSet,
    DataError,
    DataOptions,
    add_data_flags,
    build_sets,
    load_tokenizer,
)
from megatron_profit.flags import OneList

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters of a record's text that may be printed to the terminal.
_LAYOUT = "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the data that the flags name; the exit code is 2 where they cannot be used."""
    arguments = _parser().parse_args(argv)
    tokenizer = Path(arguments.hf_model)
    try:
        if arguments.show < 0:
            raise DataError(f"--show is {arguments.show}; it must not be negative")
        if arguments.report:
            _check_report(arguments.report)
        if arguments.seq_length < 1:
            raise DataError(f"--seq-length is {arguments.seq_length}; it must be at least 1")
        if not 0 <= arguments.seed < 2**64:
            raise DataError(f"--seed is {arguments.seed}; it must be in 0..2^64 - 1")
        options = DataOptions.from_flags(vars(arguments))
        sets = build_sets(options, tokenizer, progress=_tell)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.report:
        with whole_file(arguments.report) as report:
            report.write(json.dumps(_as_json(sets), indent=1).encode() + b"\n")
    try:
        for name, found in sets.items():
            print(describe(name, sets))
            if arguments.show and name == "train":
                _show(found, load_tokenizer(tokenizer), arguments.show)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read this has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _check_report(file: Path) -> None:
    """Raise a DataError where a report cannot be written, before there is one."""
    if not file.parent.is_dir():
        raise DataError(f"--report: the folder {file.parent} does not exist")
    if (file.exists() and not file.is_file()) or not os.access(file.parent, os.W_OK):
        raise DataError(f"--report {file} cannot be written; name another file")


def describe(name: str, sets: dict[str, BuiltSet]) -> str:
    """Return the report of a set as text. The records of a validation split are the training data's."""
    found, report = sets[name], sets[name].prepared.report
    if name != "train" and found.prepared is sets["train"].prepared:
        return f"{name} data, set aside of the records above: {found.packing}"
    amiss = found.packing.warning if name == "train" else None
    return f"{name} data: {report}\n{found.packing}" + (f"\n{warning(amiss)}" if amiss else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=FlagHelp, allow_abbrev=False
    )
    parser.register("action", None, OneList)
    parser.add_argument("--hf-model", required=True, metavar="DIR", help="Folder of the tokenizer.")
    parser.add_argument("--seq-length", type=int, required=True, help="Positions of a row.")
    parser.add_argument("--seed", type=int, default=1234, help="Of the order of the rows.")
    parser.add_argument("--report", type=Path, metavar="FILE", help="Write the report as JSON.")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="Print N examples.")
    add_data_flags(parser.add_argument_group("data"), required=True)
    return parser


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(found: BuiltSet, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    for index in range(min(count, len(found.prepared.examples))):
        print(f"--- example {index}, {found.prepared.name(index)}")
        print(marked_text(found, tokenizer, index))


def marked_text(found: BuiltSet, tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    """Return the text of an example, with what is trained between ⟦ and ⟧."""
    ids, supervised = found.prepared.examples[index]
    parts, begin = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or supervised[end] != supervised[begin]:
            text = tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False)
            text = escaped(text, keep=_LAYOUT)
            parts.append(f"⟦{text}⟧" if supervised[begin] else text)
            begin = end
    return "".join(parts)


def _as_json(sets: dict[str, BuiltSet]) -> dict:
    # A validation split has no records of its own: they are counted with the data that it was set aside from.
    train = sets["train"].prepared
    return {
        name: ({"records": found.prepared.report.as_json()} if own else {})
        | {"rows": found.packing.as_json()}
        for name, found in sets.items()
        for own in [name == "train" or found.prepared is not train]
    }
