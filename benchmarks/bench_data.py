"""Measure the preparation of data: tokens per second and core, and how full packed rows are.

    python benchmarks/bench_data.py --tokenizer Qwen3-0.6B --data a.jsonl b.jsonl --out benchmarks/results

The preparation is compared with `datasets.map` and the bare tokenizer, on texts that are rendered
already. That reads no chat, applies no template and makes no mask, but writes a file. The tokenizer
alone, on lists of texts in memory, is the bound. All run in one process and one thread. The fastest of
`--repeats` runs counts.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import numpy as np
import torch
from benchmarking import environment, write_results
from transformers import PreTrainedTokenizerBase

from megatron_profit.data import (
    ChatRenderer,
    ColumnMapping,
    DataReport,
    DataSource,
    Preparation,
    load_tokenizer,
    normalise,
    read_records,
)
from megatron_profit.data.sequences.packing import pack
from megatron_profit.data.store.examples import collect
from megatron_profit.data.store.prepare import file_names, tokenize_records

SYNTHETIC = 1_000_000
PACKAGES = ("datasets", "tokenizers", "transformers")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write it with its JSON."""
    words = sys.argv[1:] if argv is None else argv
    arguments = _arguments(words)
    datasets.disable_progress_bars()
    layout = ColumnMapping.of_columns(arguments.data_columns)
    renderer = ChatRenderer(load_tokenizer(arguments.tokenizer))
    files = []
    for path in arguments.data:
        source = DataSource(str(path), _layout_for(path, layout))
        files.append(_measure_file(source, renderer, arguments))
    lengths = synthetic_lengths(arguments.synthetic, arguments.seq_length)
    record = {
        "environment": environment(torch.device("cpu"), PACKAGES),
        "command": shlex.join(["python", "benchmarks/bench_data.py", *words]),
        "seq_length": arguments.seq_length,
        "files": files,
        "synthetic": _measure_packing(lengths, arguments.seq_length),
    }
    body = _markdown(record)
    print(body)
    if arguments.out:
        write_results(arguments.out, "data", record, "Data preparation", body)
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument(
        "--data-columns",
        nargs="+",
        default=[],
        metavar="NAME=COLUMN",
        help="For the files whose first record has these columns.",
    )
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--synthetic", type=int, default=SYNTHETIC, help="Records to pack.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="DIR")
    return parser.parse_args(argv)


def _layout_for(path: Path, layout: ColumnMapping) -> ColumnMapping:
    """Return the layout, if the file's first record has its columns."""
    first = next(read_records(path)).value
    return layout if all(column in first for column in layout.columns.values()) else ColumnMapping()


def synthetic_lengths(count: int, seq_length: int) -> np.ndarray:
    """Return [count] lengths of a log-normal distribution, median 400 and a long tail, as chats have."""
    draws = np.random.default_rng(0).lognormal(np.log(400), 1.0, count)
    return np.clip(draws, 8, seq_length).astype(np.int64)


def _measure_file(
    source: DataSource, renderer: ChatRenderer, arguments: argparse.Namespace
) -> dict[str, Any]:
    preparation = Preparation(arguments.seq_length)
    talks = [normalise(record, source.layout) for record in read_records(source.path)]
    texts = [renderer.text(talk) for talk in talks]

    def ours() -> Any:
        report = DataReport()
        chunks = tokenize_records([source], renderer, preparation, report)
        return collect(chunks, file_names([source.files()]), report)

    tokenizer = load_tokenizer(arguments.tokenizer)
    seconds = _fastest(
        [ours, _bare_map(texts, tokenizer), _tokenizer_alone(texts, tokenizer)], arguments.repeats
    )
    prepared = ours()
    report = prepared.report
    speeds = [round(report.total_tokens / one) for one in seconds]
    lengths = prepared.examples.positions
    return {
        "file": Path(source.path).name,
        "records": report.kept,
        "tokens": report.total_tokens,
        "supervised_tokens": report.supervised_tokens,
        "tokens_per_second": speeds[0],
        "bare_tokens_per_second": speeds[1],
        "tokenizer_alone_tokens_per_second": speeds[2],
        "time_over_bare": round(seconds[0] / seconds[1], 3),
        "time_over_tokenizer_alone": round(seconds[0] / seconds[2], 3),
        "packing": _measure_packing(lengths, arguments.seq_length),
    }


def _bare_map(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Callable[[], Any]:
    """Return a run of `datasets.map` with the tokenizer alone, which writes its cache file as always."""
    data = datasets.Dataset.from_dict({"text": texts})

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)
        return {"input_ids": ids["input_ids"]}

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            data.map(
                tokenize,
                batched=True,
                remove_columns=["text"],
                cache_file_name=f"{folder}/ids.arrow",
                load_from_cache_file=False,
            )

    return run


def _tokenizer_alone(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Callable[[], Any]:
    """Return a run of the tokenizer, on batches as large as `datasets.map`'s, with its results dropped."""

    def run() -> None:
        for begin in range(0, len(texts), 1000):
            tokenizer(
                texts[begin : begin + 1000], add_special_tokens=False, return_attention_mask=False
            )

    return run


def _measure_packing(lengths: np.ndarray, seq_length: int) -> dict[str, Any]:
    start = time.perf_counter()
    rows = pack(lengths, seq_length)
    seconds = time.perf_counter() - start
    return {
        "records": len(lengths),
        "rows": len(rows),
        "filled": round(float(lengths.sum() / (len(rows) * seq_length)), 5),
        "unpacked_filled": round(float(lengths.mean() / seq_length), 5),
        "seconds": round(seconds, 3),
    }


def _fastest(runs: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Return the CPU seconds of the fastest run of each.

    They run in turn, so that a busy machine disturbs all alike.
    """
    best = [float("inf")] * len(runs)
    for _ in range(repeats):
        for number, run in enumerate(runs):
            start = time.process_time()
            run()
            best[number] = min(best[number], time.process_time() - start)
    return best


def _markdown(result: dict[str, Any]) -> str:
    synthetic = result["synthetic"]
    lines = [
        f"One core, CPU time, fastest run. Rows of {result['seq_length']:,} positions.",
        "",
        "| file | records | tokens | tokens/s: chat file to ids and mask | tokens/s: `datasets.map`, bare "
        "tokenizer | tokens/s: tokenizer alone | time over `datasets.map` | time over tokenizer alone | "
        "rows filled | without packing | packing, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in result["files"]:
        packing = found["packing"]
        lines.append(
            f"| {found['file']} | {found['records']:,} | {found['tokens']:,} | "
            f"{found['tokens_per_second']:,} | {found['bare_tokens_per_second']:,} | "
            f"{found['tokenizer_alone_tokens_per_second']:,} | {found['time_over_bare']:.2f} | "
            f"{found['time_over_tokenizer_alone']:.2f} | {packing['filled']:.1%} | "
            f"{packing['unpacked_filled']:.1%} | {packing['seconds']} |"
        )
    lines.append(
        f"| synthetic (log-normal, median 400) | {synthetic['records']:,} | | | | | | | "
        f"{synthetic['filled']:.2%} | {synthetic['unpacked_filled']:.1%} | {synthetic['seconds']} |"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
