"""Convert a HuggingFace folder to a Megatron torch_dist checkpoint.

    python -m checkpoint_conversion.hf_to_megatron --hf DIR --out DIR

It reads safetensors and writes DIR/release and DIR/latest_checkpointed_iteration.txt, which Megatron
loads at any tensor and pipeline parallel size.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from checkpoint_conversion import cli
from checkpoint_conversion.dry_run import print_import
from checkpoint_conversion.engine.dtypes import DType, chosen_dtype
from checkpoint_conversion.engine.output import whole_folder
from checkpoint_conversion.engine.raw_files import OpenFiles
from checkpoint_conversion.engine.workers import worker_count
from checkpoint_conversion.families import TensorRule, extra_states
from checkpoint_conversion.hf.carried import description, notes_on
from checkpoint_conversion.hf.chunks import TensorChunk, chunks_of
from checkpoint_conversion.hf.model import HFModel, open_hf_model
from checkpoint_conversion.progress import ProgressLine, human
from checkpoint_conversion.torch_dist.saved_arguments import stock_flags
from checkpoint_conversion.torch_dist.writer import write_release


@dataclass(frozen=True)
class ImportPlan:
    """A checked HuggingFace folder, and the dtype to write for each Megatron tensor."""

    model: HFModel
    tensors: tuple[tuple[TensorRule, DType], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors to write."""
        return sum(math.prod(rule.megatron_shape) * dtype.itemsize for rule, dtype in self.tensors)


def plan_import(hf: str | Path, dtype: str = "source", allow_pickle: bool = False) -> ImportPlan:
    """Check a HuggingFace folder; only config.json and headers are read.

    Raises:
        ConversionError: For anything that cannot be converted.
    """
    chosen = chosen_dtype(dtype)
    model = open_hf_model(hf, allow_pickle)
    tensors = tuple(
        (rule.renamed(key), chosen or model.dtype_of(rule))
        for rule in model.rules
        for key in rule.keys
    )
    return ImportPlan(model, tensors)


def hf_to_megatron(
    hf: str | Path,
    out: str | Path,
    *,
    dtype: str = "source",
    overwrite: bool = False,
    check_finite: bool = False,
    allow_pickle: bool = False,
    workers: int | None = None,
    progress: TextIO | None = None,
) -> ImportPlan:
    """Convert a HuggingFace folder to a Megatron torch_dist checkpoint.

    Args:
        hf: Folder with config.json and safetensors weights.
        out: Folder to write; it appears whole or not at all.
        dtype: "source", "fp32", "bf16" or "fp16".
        overwrite: Replace an earlier output in `out`.
        check_finite: Refuse NaN and infinity.
        allow_pickle: Accept pytorch_model.bin where there are no safetensors.
        workers: Number of threads; None for one per core, at most 8.
        progress: Stream for progress lines.

    Returns:
        The plan that was carried out.

    Raises:
        ConversionError: For anything that cannot be converted; then no output is written.
    """
    plan = plan_import(hf, dtype, allow_pickle)
    threads = worker_count(workers)
    model = plan.model
    model.check_alias()
    with (
        whole_folder(Path(out), [model.folder], overwrite, "hf_to_megatron", plan.nbytes) as folder,
        OpenFiles() as files,
    ):
        counter = ProgressLine(len(plan.tensors), plan.nbytes, progress)

        def read(chunk: TensorChunk, kind: DType, into: memoryview) -> None:
            model.read_into(chunk, kind, into, files, check_finite)
            counter.add(chunk.key, len(into))

        write_release(
            folder,
            [(chunk, kind) for rule, kind in plan.tensors for chunk in chunks_of(rule, kind)],
            read,
            model.family.megatron_arguments(model.config),
            extra_states(model.rules),
            threads,
            notes_on(model.carried),
        )
        counter.finish()
    return plan


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog=cli.program("checkpoint_conversion.hf_to_megatron"), formatter_class=cli.FlagHelp
    )
    parser.add_argument("--hf", required=True, metavar="DIR", help="HuggingFace model folder")
    cli.add_output_options(parser)
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="accept pytorch_model.bin where there are no safetensors; no code in it is run",
    )
    parser.add_argument("--dry-run", action="store_true", help=cli.DRY_RUN)
    options = parser.parse_args()
    if options.dry_run:
        plan = plan_import(options.hf, options.dtype, options.allow_pickle)
        print_import(plan, worker_count(options.workers))
        return 0
    plan = hf_to_megatron(
        options.hf,
        options.out,
        allow_pickle=options.allow_pickle,
        progress=sys.stderr,
        **cli.output_options(options),
    )
    print(
        f"{len(plan.tensors)} tensors, {human(plan.nbytes)}, written to {options.out}; train "
        f"with: torchrun … -m megatron_profit.sft --hf-model {options.hf} "
        f"--pretrained-checkpoint {options.out} …"
    )
    model = plan.model
    if model.carried:
        print(description(model.carried))
    flags = stock_flags(model.family.megatron_arguments(model.config))
    if flags is None:
        print(
            "Megatron-LM's own scripts cannot load it: their Gated DeltaNet takes its norm as zero-centred, "
            "and this model's is not"
        )
    else:
        print(
            f"Megatron-LM's pretrain_gpt.py: --load {options.out} --use-checkpoint-args {flags} …"
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
