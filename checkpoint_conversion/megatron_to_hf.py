"""Convert a Megatron torch_dist checkpoint to a HuggingFace folder.

    python -m checkpoint_conversion.megatron_to_hf --megatron DIR --hf-template DIR --out DIR

The template is the HuggingFace folder that training started from. It gives the architecture, the
tokenizer and everything else but the weights. Optimizer state in the checkpoint is ignored, and rows
that pad the vocabulary are dropped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from checkpoint_conversion import cli
from checkpoint_conversion.engine.dtypes import DType, chosen_dtype
from checkpoint_conversion.engine.output import whole_folder
from checkpoint_conversion.engine.raw_files import OpenFiles
from checkpoint_conversion.engine.workers import Buffers, run_all, worker_count
from checkpoint_conversion.families import family_for
from checkpoint_conversion.hf.chunks import TensorChunk
from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.hf.plan import COMMAND, files_of, for_older_readers, with_dtype
from checkpoint_conversion.hf.stop_tokens import StopTokens, plan_stop_tokens, trained_turn_end
from checkpoint_conversion.hf.writer import (
    DEFAULT_SHARD_SIZE,
    HFWriter,
    TensorSpec,
    artifacts,
    copy_artifacts,
)
from checkpoint_conversion.progress import ProgressLine, human
from checkpoint_conversion.torch_dist.folder import find_checkpoint
from checkpoint_conversion.torch_dist.reader import MegatronCheckpoint, open_checkpoint
from checkpoint_conversion.torch_dist.saved_arguments import check_checkpoint_matches


@dataclass(frozen=True)
class ExportPlan:
    """A checked checkpoint, and the HuggingFace files to write.

    Attributes:
        stops: The content of config.json to write, and the tokens at which the model stops.
        tensors: The HuggingFace tensors by name.
        weight_map: The file of each tensor.
    """

    checkpoint: MegatronCheckpoint
    template: Path
    stops: StopTokens
    tensors: Mapping[str, TensorSpec]
    weight_map: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors to write."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def dtype_of(self, chunk: TensorChunk) -> DType:
        """Return the dtype to write for a part of a Megatron tensor."""
        return self.tensors[chunk.piece.hf[0]].dtype


def plan_export(
    megatron: str | Path,
    hf_template: str | Path,
    *,
    iteration: str | int | None = None,
    dtype: str = "source",
    max_shard_size: str | int | None = None,
    ignore_arguments: bool = False,
) -> ExportPlan:
    """Check a checkpoint against a template; no tensor is read.

    Args:
        megatron, hf_template, iteration, dtype, max_shard_size, ignore_arguments: As in `megatron_to_hf`.

    Raises:
        ConversionError: For anything that cannot be converted.
    """
    chosen = chosen_dtype(dtype)
    template = Path(hf_template)
    config = read_hf_config(template)
    rules = family_for(config).tensor_rules(config)
    if not ignore_arguments:
        check_checkpoint_matches(Path(megatron), config, template, iteration)
    checkpoint = open_checkpoint(find_checkpoint(megatron, iteration), rules)
    tensors = {
        name: TensorSpec(shape, chosen or checkpoint.dtypes[rule.megatron])
        for rule in checkpoint.rules
        for piece in rule.pieces()
        for name, shape in zip(piece.hf, rule.hf.values(), strict=True)
    }
    weight_map = files_of(template, tensors, max_shard_size)
    artifacts(template)
    written = for_older_readers(with_dtype(config, tensors))
    stops = plan_stop_tokens(template, written, trained_turn_end(checkpoint.folder))
    return ExportPlan(checkpoint, template, stops, tensors, weight_map)


def megatron_to_hf(
    megatron: str | Path,
    hf_template: str | Path,
    out: str | Path,
    *,
    iteration: str | int | None = None,
    dtype: str = "source",
    max_shard_size: str | int | None = None,
    ignore_arguments: bool = False,
    overwrite: bool = False,
    check_finite: bool = False,
    workers: int | None = None,
    progress: TextIO | None = None,
) -> ExportPlan:
    """Convert a Megatron torch_dist checkpoint to a HuggingFace folder.

    Args:
        megatron: Megatron's save folder, or a checkpoint in it.
        hf_template: HuggingFace folder of the same architecture.
        out: Folder to write; it appears whole or not at all.
        iteration: A number or "release"; None for the latest.
        dtype: "source" (as in the checkpoint), "fp32", "bf16" or "fp16".
        max_shard_size: For example "5GB". None: the files of the template when it has an index, else at
            most 5 GB each.
        ignore_arguments: Do not compare the arguments that the checkpoint keeps with the template.
        overwrite: Replace an earlier output in `out`.
        check_finite: Refuse NaN and infinity.
        workers: Number of threads; None for one per core, at most 8.
        progress: Stream for progress lines.

    Returns:
        The plan that was carried out.

    Raises:
        ConversionError: For anything that cannot be converted; then no output is written.
    """
    plan = plan_export(
        megatron,
        hf_template,
        iteration=iteration,
        dtype=dtype,
        max_shard_size=max_shard_size,
        ignore_arguments=ignore_arguments,
    )
    checkpoint = plan.checkpoint
    threads = worker_count(workers)
    sources = [plan.template, checkpoint.folder]
    chunks = (chunk for rule in checkpoint.rules for chunk in checkpoint.chunks(rule))
    buffers = Buffers()
    counter = ProgressLine(len(plan.tensors), plan.nbytes, progress)
    with (
        whole_folder(Path(out), sources, overwrite, COMMAND, plan.nbytes) as folder,
        HFWriter(folder, plan.tensors, plan.weight_map) as writer,
        OpenFiles() as files,
    ):

        def export(chunk: TensorChunk) -> None:
            dtype = plan.dtype_of(chunk)
            data = buffers.first(chunk.elements * dtype.itemsize)
            row_bytes = len(data) // chunk.rows
            checkpoint.read_into(chunk, dtype, data, files, check_finite)
            for source, start, rows in chunk.layout:
                part, data = data[: rows * row_bytes], data[rows * row_bytes :]
                writer.write_rows(chunk.piece.hf[source], start, part)
                counter.add(chunk.piece.hf[source], len(part))

        run_all(export, chunks, threads)
        checkpoint.check_rest(files)
        writer.flush()
        copy_artifacts(plan.template, folder, plan.stops)
        counter.finish()
    return plan


def _print_plan(plan: ExportPlan, workers: int) -> None:
    rows, parts = [], []
    for rule in plan.checkpoint.rules:
        source = plan.checkpoint.dtypes[rule.megatron]
        for piece in rule.pieces():
            place = "".join([rule.megatron, *(f"[{i}]" for i in piece.index)])
            for name in piece.hf:
                target = plan.tensors[name]
                kinds = " -> ".join(dict.fromkeys((source.name, target.dtype.name)))
                shape = list(target.shape)
                rows.append((place, name, plan.weight_map[name], shape, kinds, target.nbytes))
                parts.append((cli.part_bytes(target.shape, target.dtype), source != target.dtype))
    cli.print_table(("source", "target", "file", "shape", "dtype", "bytes"), rows)
    rules = len(plan.checkpoint.rules)
    cli.print_totals(f"{rules} tensors -> {len(rows)} tensors", plan.nbytes, workers, parts)


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog=cli.program("checkpoint_conversion.megatron_to_hf"), formatter_class=cli.FlagHelp
    )
    parser.add_argument("--megatron", required=True, metavar="DIR", help="Megatron save folder")
    parser.add_argument(
        "--hf-template", required=True, metavar="DIR", help="HuggingFace folder to take the rest of"
    )
    cli.add_output_options(parser)
    parser.add_argument("--iteration", metavar="N", help="a number or 'release' (default: latest)")
    parser.add_argument("--dry-run", action="store_true", help=cli.DRY_RUN)
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help=f"such as 5GB (default: as the template's index, else {DEFAULT_SHARD_SIZE})",
    )
    parser.add_argument("--ignore-arguments", action="store_true", help=cli.IGNORE_ARGUMENTS)
    options = parser.parse_args()
    if options.dry_run:
        plan = plan_export(
            options.megatron,
            options.hf_template,
            iteration=options.iteration,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            ignore_arguments=options.ignore_arguments,
        )
        _print_plan(plan, worker_count(options.workers))
        if plan.stops.added is not None:
            print(plan.stops)
        return 0
    plan = megatron_to_hf(
        options.megatron,
        options.hf_template,
        options.out,
        iteration=options.iteration,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        ignore_arguments=options.ignore_arguments,
        overwrite=options.overwrite,
        check_finite=options.check_finite,
        workers=options.workers,
        progress=sys.stderr,
    )
    if plan.stops.added is not None:
        print(plan.stops)
    if plan.checkpoint.padding:
        print(f"left out: {plan.checkpoint.padding} rows that pad the vocabulary")
    print(
        f"{len(plan.tensors)} tensors, {human(plan.nbytes)} of {plan.checkpoint.folder} "
        f"written to {options.out}; use it with: "
        f"AutoModelForCausalLM.from_pretrained({options.out!r})"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
