"""Measure attention over packed rows, forward and backward: Transformer Engine's kernel and torch's.

    python benchmarks/bench_attention.py                                        # on a GPU
    python benchmarks/bench_attention.py --seq-length 1024 --rows 3 --device cpu

Each row holds records of other lengths (log-normal, as in chats), so its shapes are new, as in every
micro-batch. Then the same row is measured again. The difference shows the cost of preparing for a new
shape. Kernels are loaded before, by a row that is not counted. For comparison, one record that fills
the row is measured too. The results go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from bench_data import synthetic_lengths
from benchmarking import RESULTS, environment, markdown_table, write_results

from megatron_profit.models.attention import (
    ScaledDotProductAttention,
    computes_unfused,
    with_variable_lengths,
)
from megatron_profit.models.record_spans import RecordSpans, record_bounds

ENGINE, TORCH = "Transformer Engine", "torch"


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, and write it with its JSON."""
    options = _parser().parse_args(argv)
    device = torch.device(options.device)
    torch.manual_seed(0)
    rows = packed_rows(options.rows + 1, options.seq_length)
    whole = torch.arange(options.seq_length)[None]
    results: dict[str, dict[str, list[float]]] = {}
    for name, core in cores(options).items():
        times = [[timed(core, row, options) for _ in range(2)] for row in rows][1:]
        if name == ENGINE and computes_unfused():
            name = f"{ENGINE}, which has no kernel for records here"
        results[name] = {
            "new": [first for first, _ in times],
            "again": [again for _, again in times],
            "one record": [timed(core, whole, options) for _ in range(options.rows + 1)][1:],
        }
    record = {
        "command": " ".join(
            ["python benchmarks/bench_attention.py", *(sys.argv[1:] if argv is None else argv)]
        ),
        "environment": environment(device, ("transformer-engine", "flash-attn"))
        | ({"cuDNN": torch.backends.cudnn.version()} if device.type == "cuda" else {}),
        "milliseconds": results,
    }
    page = write_results(
        options.out, f"attention-{options.device}", record, _title(options), _table(results)
    )
    print(page.read_text())


def packed_rows(count: int, seq_length: int) -> list[torch.Tensor]:
    """Return position ids [1, S] of rows that records fill; the last record of each row is cut."""
    rows = []
    lengths = iter(synthetic_lengths(count * seq_length, seq_length))
    for _ in range(count):
        parts: list[torch.Tensor] = []
        while (left := seq_length - sum(map(len, parts))) > 0:
            parts.append(torch.arange(min(int(next(lengths)), left)))
        rows.append(torch.cat(parts)[None])
    return rows


def cores(options: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """Return the core attentions that can run here."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=options.heads * options.head_dim,
        num_attention_heads=options.heads,
        num_query_groups=options.groups,
        kv_channels=options.head_dim,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    kinds: dict[str, Callable[..., torch.nn.Module]] = {TORCH: ScaledDotProductAttention}
    if options.device == "cuda" and importlib.util.find_spec("transformer_engine"):
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        kinds = {ENGINE: with_variable_lengths(TEDotProductAttention)} | kinds
    return {name: kind(config, 1, AttnMaskType.causal, "self") for name, kind in kinds.items()}


def timed(core: torch.nn.Module, position_ids: torch.Tensor, options: argparse.Namespace) -> float:
    """Return the milliseconds of a forward and a backward pass over one row.

    The time includes finding where the row's records lie.
    """
    from megatron.core.transformer.enums import AttnMaskType

    def random(heads: int) -> torch.Tensor:
        shape = (options.seq_length, 1, heads, options.head_dim)
        return torch.randn(shape, device=options.device, dtype=torch.bfloat16, requires_grad=True)

    inputs = random(options.heads), random(options.groups), random(options.groups)
    upstream = torch.randn_like(inputs[0]).flatten(2)
    _wait(options.device)
    start = time.perf_counter()
    count, length = position_ids.shape
    rows = RecordSpans.of(
        record_bounds(position_ids), (count, length), torch.device(options.device)
    )
    core(*inputs, None, AttnMaskType.causal, packed_seq_params=rows).backward(upstream)
    _wait(options.device)
    return 1e3 * (time.perf_counter() - start)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _title(options: argparse.Namespace) -> str:
    return (
        f"Attention over packed rows of {options.seq_length:,} positions, {options.heads} heads of "
        f"{options.head_dim}, {options.groups} of keys, bf16"
    )


def _table(results: dict[str, dict[str, list[float]]]) -> str:
    header = [
        "ms, medians",
        "records of new lengths",
        "the longest",
        "the same again",
        "one record",
    ]
    lines = [
        [
            name,
            f"{median(found['new']):.1f}",
            f"{max(found['new']):.1f}",
            f"{median(found['again']):.1f}",
            f"{median(found['one record']):.1f}",
        ]
        for name, found in results.items()
    ]
    return markdown_table(header, lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--seq-length", type=int, default=8192, help="Positions of a row.")
    parser.add_argument("--rows", type=int, default=20, help="That are measured.")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--groups", type=int, default=8, help="Heads of keys and values.")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    main()
