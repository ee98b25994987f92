"""Show every token of chosen records with its probability, kept or dropped by an objective.

    megatron-profit report --model Qwen3-0.6B-Base --data chats.jsonl --out report.html
    megatron-profit report --megatron runs/14b --hf-template Qwen3-14B-Base --data chats.jsonl \
        --records 0-9,250 --objective "profit prob_threshold=0.1 threshold_direction=higher" --terminal

The page needs no other file. It has a threshold slider, the objectives side by side, a histogram of the
probabilities, search, and each record as text and as a table. Objectives that rank tokens rank the page's
tokens.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint_conversion.cli import FlagHelp, wants_color
from checkpoint_conversion.engine.output import problem_of_place, whole_file
from checkpoint_conversion.errors import ConversionError, escaped
from checkpoint_conversion.families.config import text_config
from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.megatron_to_hf import megatron_to_hf
from megatron_profit.data import (
    BrokenRecord,
    ChatRenderer,
    Conversation,
    DataError,
    DataSource,
    RawRecord,
    RenderedConversation,
    SupervisionPolicy,
    load_tokenizer,
    normalise,
    read_records,
    read_sources,
)
from megatron_profit.data.chat.conversations import is_read
from megatron_profit.data.files.sources import refuse_unused
from megatron_profit.data.flags import add_rendering_flags
from megatron_profit.data.render.template import check_vocabulary
from megatron_profit.data.render.template_date import parse_day
from megatron_profit.flags import OneList
from megatron_profit.objectives import Objective, build_objective, objective_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_profit.token_report import TokenRecord

OBJECTIVES = (
    "profit prob_threshold=0.1 threshold_direction=higher",
    "dft",
    "entropy",
)
DTYPES = ("float32", "bfloat16")
# Flags of `to-hf` that its errors advise, and that this command does not have.
_OF_CONVERSION = ("--base", "--ignore-arguments", "--max-shard-size")


class ReportError(ValueError):
    """The report cannot be made; the message says what to do."""


def parse_objective(text: str) -> tuple[str, Objective]:
    """Return the name and the objective of "name option=value ...".

    Commas join several values of one option. For example, the text may be
     "profit prob_threshold=0.1 threshold_direction=higher".

    Raises:
        ReportError: an unknown name or option, or a value that does not fit.
    """
    name, *settings = text.split() or [""]
    try:
        types = {
            option.name: option.metadata.get("type", str) for option in objective_options(name)
        }
        options = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals:
                raise ValueError(f"{setting!r} is not of the form option=value")
            options[key] = types.get(key, str)(value)
        return text, build_objective(name, **options)
    except ValueError as error:
        raise ReportError(f"--objective {text!r}: {error}") from error


def parse_records(text: str) -> list[range]:
    """Return the positions of a text. For example, "0-9,250" gives 0 to 9 and 250.

    Raises:
        ReportError: the text has another form.
    """
    chosen = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            chosen.append(range(int(first), int(last if dash else first) + 1))
        except ValueError:
            raise ReportError(
                f"--records {text!r}: {part!r} is neither a number nor a range"
            ) from None
        if not chosen[-1]:
            raise ReportError(
                f"--records {text!r}: {part!r} chooses no record; write the smaller number first"
            )
    return chosen


def chosen_records(
    sources: Sequence[DataSource],
    positions: Sequence[range],
    renderer: ChatRenderer,
    max_tokens: int,
) -> list[tuple[str, RenderedConversation]]:
    """Return the records at the positions, counted over all sources, that can be rendered.

    Raises:
        ReportError: a position or a range begins after the last record, or no record is usable.
        DataError: a file cannot be read, or its first record is in no known format.
    """
    found, read = [], 0
    everything = (
        (source, record)
        for source in sources
        for record in read_records(source.path, source.split, is_read(source.layout))
    )
    stop = max(part.stop for part in positions)
    for read, (source, record) in enumerate(islice(everything, stop), 1):
        chosen = any(read - 1 in part for part in positions)
        if not chosen and not record.first:  # the first one shows whether the format is known
            continue
        try:
            talk = normalise(record, source.layout)
            if chosen:
                found += rendered_examples(record, talk, renderer, max_tokens)
        except BrokenRecord as error:
            if chosen:
                left_out(f"{record.where}: {error}")
    last = max(part.start for part in positions)
    if last >= read:
        raise ReportError(f"--records {last}: there are only {read} records (0 to {read - 1})")
    if not found:
        raise ReportError("none of the chosen records can be used; choose others with --records")
    return found


def rendered_examples(
    record: RawRecord, talk: Conversation, renderer: ChatRenderer, max_tokens: int
) -> list[tuple[str, RenderedConversation]]:
    """Return the examples of a record with their names.

    There is one example, unless each turn of the record is trained by itself.

    Raises:
        BrokenRecord: one of them cannot be rendered.
    """
    examples = renderer.training.examples(talk)
    found = []
    for number, example in enumerate(examples, 1):
        whole = renderer.render(example)
        cut = RenderedConversation(whole.ids[:max_tokens], whole.supervised[:max_tokens])
        turn = f", turn {number}" if len(examples) > 1 else ""
        if cut.supervised[1:].any():
            name = f"{Path(record.file).name}, {record.unit} {record.number}{turn}"
            found.append((escaped(name), cut))
        else:
            left_out(f"{record.where}{turn}: nothing supervised in {max_tokens} tokens")
    return found


def check_entries(model: str, tokens: int) -> None:
    """Refuse a model with fewer entries than tokens; raises `DataError`."""
    entries = text_config(read_hf_config(model)).get("vocab_size")
    if isinstance(entries, int):
        check_vocabulary(Path(model), tokens, entries)


def check_reference(
    reference: str,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[tuple[str, RenderedConversation]],
) -> None:
    """Refuse a reference to which an id of the records is another token, so that its numbers have no meaning.

    Raises:
        ReportError: Names the id and both tokens.
        DataError: The reference has too few entries, or its tokenizer cannot be loaded.
    """
    if (Path(reference) / "tokenizer.json").is_file():
        ids = sorted({int(i) for _, record in records for i in record.ids})
        theirs = load_tokenizer(Path(reference)).convert_ids_to_tokens(ids)
        for i, own, other in zip(ids, tokenizer.convert_ids_to_tokens(ids), theirs, strict=True):
            if own != other:
                raise ReportError(
                    f"--ref-model {reference}: its token {i} is {other!r}, and the model's is {own!r}; name "
                    "a reference with the model's tokenizer"
                )
    check_entries(reference, len(tokenizer))


def left_out(what: str) -> None:
    """Print that a record or turn was left out."""
    print(f"left out {escaped(what)}", file=sys.stderr)


@contextmanager
def megatron_as_hf(megatron: str, template: str) -> Iterator[str]:
    """Convert the Megatron checkpoint to a HuggingFace folder that exists inside the block only.

    Raises:
        ConversionError: It cannot be converted.
        ReportError: It can with a flag of the conversion.
    """
    with tempfile.TemporaryDirectory(prefix="token_report_") as scratch:
        out = Path(scratch) / "hf"
        try:
            megatron_to_hf(megatron, template, out, progress=sys.stderr)
        except ConversionError as error:
            if not any(flag in str(error) for flag in _OF_CONVERSION):
                raise
            raise ReportError(
                f"{error}; these are flags of `megatron-profit to-hf`: convert with it, and give the result "
                "as --model"
            ) from error
        yield str(out)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=FlagHelp,
        allow_abbrev=False,
    )
    parser.register("action", None, OneList)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help="HuggingFace folder of the model")
    source.add_argument(
        "--megatron", metavar="DIR", help="Megatron checkpoint; needs --hf-template"
    )
    parser.add_argument(
        "--hf-template", metavar="DIR", help="HuggingFace folder with its config and tokenizer"
    )
    parser.add_argument(
        "--ref-model", metavar="DIR", help="HuggingFace folder of a reference model"
    )
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FILE", help="chat files, as in training"
    )
    add_rendering_flags(parser)
    parser.add_argument("--records", default="0-19", help="positions over all files, e.g. 0-9,250")
    parser.add_argument(
        "--max-tokens", type=int, default=8192, help="longer records lose their end"
    )
    parser.add_argument(
        "--objective",
        action="append",
        metavar="'NAME OPTION=VALUE …'",
        help="an objective to compare; may be repeated (default: profit at 0.1, dft, entropy)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the forward pass")
    parser.add_argument("--seed", type=int, default=1234, help="of objectives that draw")
    parser.add_argument("--title", help="heading of the page (default: the model's folder)")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="page to write")
    parser.add_argument(
        "--terminal",
        action="store_true",
        help="print the records in colour, marked by the first objective",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page")
    arguments = parser.parse_args(argv)
    _check(arguments, parser)
    return arguments


def _check(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if bool(arguments.megatron) != bool(arguments.hf_template):
        parser.error("--megatron and --hf-template go together")
    if arguments.out is None and not arguments.terminal:
        parser.error("no output is asked for: give --out FILE.html, --terminal or both")
    if arguments.max_tokens < 2:
        parser.error(f"--max-tokens is {arguments.max_tokens}; it must be at least 2")


def check_output(path: Path | None, overwrite: bool) -> None:
    """Refuse an output that cannot be written before the model is loaded."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ReportError(f"--out {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ReportError(f"--out {path} is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise ReportError(f"--out {path} is a pipe or a device; name a file")
    if (problem := problem_of_place(path.parent)) is not None:
        raise ReportError(f"--out {path}: {problem}")
    if path.exists() and not overwrite:
        raise ReportError(f"--out {path} exists; give --overwrite to replace it")


def make_report(arguments: argparse.Namespace) -> None:
    """Make the report and write or print it.

    Raises:
        ReportError, DataError, ConversionError: for input that cannot be used; the message says what to do.
    """
    import torch

    from megatron_profit.evaluation.engines.model_folder import load_model
    from megatron_profit.token_report import score_records

    check_output(arguments.out, arguments.overwrite)
    objectives = dict(map(parse_objective, arguments.objective or OBJECTIVES))
    positions = parse_records(arguments.records)
    folder = arguments.hf_template or arguments.model
    read_hf_config(folder)  # a better message than the tokenizer's, where it is no model
    tokenizer = load_tokenizer(Path(folder))
    check_entries(folder, len(tokenizer))
    naming = {
        "columns": arguments.data_columns or (),
        "dataset_info": arguments.dataset_info,
    }
    sources = read_sources(arguments.data, **naming)
    refuse_unused(arguments.data, **naming)
    training = SupervisionPolicy(arguments.train_on, arguments.train_think)
    renderer = ChatRenderer(
        tokenizer,
        training,
        parse_day(arguments.template_date),
        arguments.allow_special_tokens or (),
    )
    records = chosen_records(sources, positions, renderer, arguments.max_tokens)
    if arguments.ref_model:
        check_reference(arguments.ref_model, tokenizer, records)
    source = (
        megatron_as_hf(arguments.megatron, arguments.hf_template)
        if arguments.megatron
        else nullcontext(arguments.model)
    )
    dtype, reference = getattr(torch, arguments.dtype), arguments.ref_model
    with source as model_folder:
        scored = score_records(
            load_model(Path(model_folder), dtype),
            tokenizer,
            records,
            objectives,
            ref_model=load_model(Path(reference), dtype) if reference else None,
            seed=arguments.seed,
            progress=lambda line: print(line, file=sys.stderr),
        )
    _show(arguments, scored, objectives)


def _show(
    arguments: argparse.Namespace,
    scored: Sequence[TokenRecord],
    objectives: Mapping[str, Objective],
) -> None:
    """Write the page, print the terminal form, or both."""
    from megatron_profit.token_report import page, slider_start, terminal_text

    if arguments.out is not None:
        title = (
            arguments.title or f"Token report: {Path(arguments.megatron or arguments.model).name}"
        )
        files = ", ".join(Path(file).name for file in arguments.data)
        subtitle = f"{len(scored)} records of {files}; {arguments.dtype}"
        threshold = slider_start(objectives.values())
        with whole_file(arguments.out) as stream:
            stream.write(page(scored, title=title, subtitle=subtitle, **threshold).encode())
        print(f"wrote {arguments.out} ({arguments.out.stat().st_size:,} bytes)", file=sys.stderr)
    if arguments.terminal:
        color = wants_color()
        for record in scored:
            print(
                terminal_text(record, next(iter(objectives)), color=color), end="\n\n", flush=True
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Make the report; return 1 for input that cannot be used."""
    arguments = parse_arguments(argv)
    try:
        make_report(arguments)
    except BrokenPipeError:  # whoever read the terminal form has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ReportError, DataError, ConversionError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
