"""The tables of --dry-run: each tensor with source, target, shape, dtype and bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoint_conversion import cli
from checkpoint_conversion.hf.carried import description
from checkpoint_conversion.hf.writer import TensorSpec

if TYPE_CHECKING:
    from checkpoint_conversion.adapters.peft_folder import AdapterOutput
    from checkpoint_conversion.hf_to_megatron import ImportPlan
    from checkpoint_conversion.megatron_to_hf import ExportPlan


def print_import(plan: ImportPlan, workers: int) -> None:
    """Print the tensors of a conversion to Megatron."""
    rows, parts = [], []
    for rule, dtype in plan.tensors:
        for piece in rule.pieces():
            target = "".join([rule.megatron, *(f"[{i}]" for i in piece.index)])
            for name, shape in rule.parts(piece):
                kinds = dict.fromkeys((plan.model.tensors[name].dtype, dtype.name))
                size = TensorSpec(shape, dtype).nbytes
                rows.append((name, target, list(shape), " -> ".join(kinds), size))
                parts.append((cli.part_bytes(shape, dtype), len(kinds) > 1))
    cli.print_table(("source", "target", "shape", "dtype", "bytes"), rows)
    if plan.model.alias:
        print(f"{plan.model.alias}: not copied, the embeddings are tied")
    if plan.model.carried:
        print(description(plan.model.carried))
    count = f"{len(plan.model.names())} tensors -> {len(plan.tensors)} tensors"
    cli.print_totals(count, plan.nbytes, workers, parts)


def print_export(plan: ExportPlan, workers: int) -> None:
    """Print the tensors of a conversion to HuggingFace."""
    rows, parts = [], []
    for rule in plan.checkpoint.rules:
        source = plan.checkpoint.dtypes[rule.megatron]
        for piece in rule.pieces():
            place = "".join([rule.megatron, *(f"[{i}]" for i in piece.index)])
            for name, shape in rule.parts(piece):
                dtype = plan.tensors[name].dtype
                kinds = " -> ".join(dict.fromkeys((source.name, dtype.name)))
                size = TensorSpec(shape, dtype).nbytes
                rows.append((place, name, plan.weight_map[name], list(shape), kinds, size))
                parts.append((cli.part_bytes(shape, dtype), source != dtype))
    cli.print_table(("source", "target", "file", "shape", "dtype", "bytes"), rows)
    if plan.carried:
        print(description(plan.carried))
    count = f"{len(plan.checkpoint.rules)} tensors -> {len(plan.all_tensors)} tensors"
    cli.print_totals(count, plan.nbytes, workers, parts)


def print_adapters(output: AdapterOutput) -> None:
    """Print the tensors of a PEFT folder."""
    rows = ((name, list(t.shape), t.dtype.name) for name, t in output.tensors.items())
    cli.print_table(("adapter", "shape", "dtype"), rows)
