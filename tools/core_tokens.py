r"""Measure how probable a model finds the tokens that carry an answer, and the rest: the paper's Figure 2.

    python tools/core_tokens.py --model models/SmolLM2-135M-Instruct --data runs/study_data/gsm8k.jsonl \
        --out core_tokens.json --figure core_tokens.png

The data have the columns `question` and `answer`. A supervised token is core if a character of it belongs to

- a number: digits, with "." and "," within them,
- an operator: one of + - * / = % $ or a multiplication or division sign (x between numbers, no hyphen),
- a name: a word with a capital that stands nowhere in the data in lower case.

All other supervised tokens are the rest: words, line breaks, "####", the end of the turn. This end is also
counted by itself, since a model that is not trained on it does not stop. The paper lets a language model
decide which tokens are core; this rule needs none.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_conversion.engine.output import whole_file
from checkpoint_conversion.errors import ConversionError
from megatron_profit.data import (
    ChatRenderer,
    DataError,
    load_tokenizer,
    read_records,
    read_sources,
)
from megatron_profit.evaluation.estimators import LEVEL

CORE = ("number", "operator", "name")
REST = "rest"
END = "end of the turn"
NUMBER = re.compile(r"\d(?:[\d.,]*\d)?")
OPERATOR = re.compile(r"[+*/=\u00d7\u00f7%$]|(?<!\w)-|-(?!\w)|(?<=\d)-(?=\d)|(?<=[\d ])x(?=[\d ])")
WORD = re.compile(r"[^\W\d_]{2,}")
THRESHOLDS = (0.1, 0.3, 0.5)
BINS = 20
DRAWS = 2_000


def names_of(texts: Sequence[str]) -> frozenset[str]:
    """Return the words with a capital that stand nowhere in the texts in lower case.

    For example, "The cat saw Ann. Then the dog saw Ann then." has the one name Ann.
    """
    words = {word for text in texts for word in WORD.findall(text)}
    return frozenset(word for word in words if word.istitle() and word.lower() not in words)


def kinds(pieces: Sequence[str], names: frozenset[str]) -> list[str]:
    """Return the kind of each token: number, operator, name or rest.

    Args:
        pieces: Text of each token; joined, the text.
        names: The names of the data.
    """
    text = "".join(pieces)
    of_character = [REST] * len(text)
    for word in WORD.finditer(text):
        if word[0] in names:
            of_character[word.start() : word.end()] = ["name"] * len(word[0])
    for kind, pattern in (("operator", OPERATOR), ("number", NUMBER)):
        for match in pattern.finditer(text):
            of_character[match.start() : match.end()] = [kind] * len(match[0])
    ends = list(accumulate(map(len, pieces)))
    return [
        next((kind for kind in of_character[end - len(piece) : end] if kind != REST), REST)
        for piece, end in zip(pieces, ends, strict=True)
    ]


def summary(prob: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return the numbers of a group of tokens.

    The interval of the mean is the bootstrap over records, since the tokens of a record are not independent.

    Args:
        prob: The probabilities of the group's tokens in each record; a record may have none. If all have
            none, the number of tokens is the only number.
    """
    everything = np.concatenate(prob)
    if not len(everything):
        return {"tokens": 0}
    sums = np.array([[p.sum(), len(p)] for p in prob])
    drawn = np.random.default_rng(0).integers(len(prob), size=(DRAWS, len(prob)))
    totals = sums[drawn].sum(axis=1)
    totals = totals[totals[:, 1] > 0]
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [tail, 100 - tail])
    return {
        "tokens": len(everything),
        "mean p": round(float(everything.mean()), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
        "median p": round(float(np.median(everything)), 4),
        "kept": {str(t): round(float((everything >= t).mean()), 4) for t in THRESHOLDS},
        "histogram": np.histogram(everything, bins=BINS, range=(0, 1))[0].tolist(),
    }


def measure(model: str, data: Path, count: int) -> dict[str, Any]:
    """Return the summary of each kind of tokens, of core and rest, in the first records of a file.

    Args:
        model: HuggingFace folder.
        data: File with the columns `question` and `answer`.
        count: How many records.

    Raises:
        DataError, ReportError: A file or the model cannot be used.
    """
    import torch

    from megatron_profit.commands.token_report import chosen_records
    from megatron_profit.evaluation.engines.model_folder import load_model
    from megatron_profit.token_report import score_records

    tokenizer = load_tokenizer(Path(model))
    columns = ("prompt=question", "response=answer")
    sources = read_sources([str(data)], columns=columns)
    records = chosen_records(sources, [range(count)], ChatRenderer(tokenizer), 8192)
    values = [record.value for record in read_records(data)]
    names = names_of([text for value in values for text in value.values()])
    groups: dict[str, list[np.ndarray]] = {kind: [] for kind in (*CORE, REST, "core", END)}

    def show(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    scored = score_records(
        load_model(Path(model), torch.float32), tokenizer, records, {}, progress=show
    )
    for record in scored:
        mine = record.supervised.numpy()
        pieces = [piece for piece, is_mine in zip(record.pieces, mine, strict=True) if is_mine]
        prob, kind = record.statistics.prob.numpy()[mine], np.array(kinds(pieces, names))
        for name in (*CORE, REST):
            groups[name].append(prob[kind == name])
        groups["core"].append(prob[kind != REST])
        groups[END].append(prob[-1:])
    return {
        "model": Path(model).name,
        "data": data.name,
        "records": len(scored),
        "groups": {name: summary(prob) for name, prob in groups.items()},
    }


def draw(report: Mapping[str, Any], file: Path) -> None:
    """Draw the histograms of core and rest with their means, into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis = figure.subplots()
    edges = np.linspace(0, 1, BINS + 1)
    for name, colour in (("core", "#0072B2"), (REST, "#D55E00")):
        group = report["groups"][name]
        if not group["tokens"]:
            continue
        share = 100 * np.array(group["histogram"]) / group["tokens"]
        label = f"{name}: mean {group['mean p']:.3f}, {group['tokens']:,} tokens"
        axis.stairs(share, edges, color=colour, lw=1.8, label=label)
        axis.axvline(group["mean p"], color=colour, ls="--", lw=1)
    axis.set_xlabel(f"probability of the token under {report['model']}")
    axis.set_ylabel("tokens of the group, %")
    axis.set_xlim(0, 1)
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    with whole_file(file) as stream:
        figure.savefig(stream, format="png", dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; return 1 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="HuggingFace folder")
    parser.add_argument("--data", type=Path, required=True, help="questions and answers")
    parser.add_argument("--records", type=int, default=500, help="the first ones (default 500)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the numbers")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="the histograms")
    arguments = parser.parse_args(argv)
    try:
        report = measure(arguments.model, arguments.data, arguments.records)
    except (DataError, ConversionError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with whole_file(arguments.out) as stream:
        stream.write(json.dumps(report).encode() + b"\n")
    if arguments.figure is not None:
        draw(report, arguments.figure)
    for name in ("core", REST, *CORE, END):
        group = report["groups"][name]
        if not group["tokens"]:
            print(f"{name}: no tokens")
            continue
        low, high = group["interval"]
        print(
            f"{name}: mean p {group['mean p']:.3f} ({low:.3f} to {high:.3f}), {group['tokens']:,} tokens"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
