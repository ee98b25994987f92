"""Convert a Megatron torch_dist checkpoint to a HuggingFace folder.

    python -m checkpoint_conversion.megatron_to_hf --megatron DIR --hf-template DIR --out DIR

The template is the HuggingFace folder that training started from. It gives the architecture, the
tokenizer and everything else but the weights. Optimizer state in the checkpoint is ignored, and rows
that pad the vocabulary are dropped. A checkpoint of adapters (LoRA) is merged into its base, which is the
template unless --base names a Megatron checkpoint; --export-adapter writes the adapters as a PEFT folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from checkpoint_conversion import cli
from checkpoint_conversion.adapters.saved import saved_adapters
from checkpoint_conversion.dry_run import print_adapters, print_export
from checkpoint_conversion.engine.dtypes import chosen_dtype
from checkpoint_conversion.engine.output import check_apart, whole_folder, write_files
from checkpoint_conversion.engine.workers import worker_count
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.export_flags import export_parser
from checkpoint_conversion.families import Config
from checkpoint_conversion.hf.carried import (
    Notes,
    carried_to_export,
    check_names,
    copy_carried,
    description,
    read_notes,
)
from checkpoint_conversion.hf.folder import HFTensor, read_hf_config
from checkpoint_conversion.hf.model import rules_in
from checkpoint_conversion.hf.plan import (
    COMMAND,
    files_of,
    for_every_reader,
    in_fp32_as_in,
    tensor_specs,
    with_dtype,
)
from checkpoint_conversion.hf.source import ModelSource
from checkpoint_conversion.hf.stop_tokens import (
    GENERATION_CONFIG,
    StopTokens,
    plan_stop_tokens,
    trained_turn_end,
)
from checkpoint_conversion.hf.writer import (
    HFWriter,
    ModelSizes,
    TensorSpec,
    artifacts,
    copy_artifacts,
    write_tensors,
)
from checkpoint_conversion.model_card.base import HubId
from checkpoint_conversion.model_card.card import base_on_hub, card_files
from checkpoint_conversion.model_card.facts import read_facts
from checkpoint_conversion.model_card.hub import FLAG, check_named_base, check_upload, upload
from checkpoint_conversion.model_card.next_steps import next_steps
from checkpoint_conversion.progress import human
from checkpoint_conversion.torch_dist.folder import find_checkpoint
from checkpoint_conversion.torch_dist.reader import open_checkpoint
from checkpoint_conversion.torch_dist.saved_arguments import check_checkpoint_matches

if TYPE_CHECKING:
    from checkpoint_conversion.adapters.peft_folder import AdapterOutput


@dataclass(frozen=True)
class ExportPlan(ModelSizes):
    """A checked checkpoint, and the HuggingFace files to write.

    Attributes:
        stops: The content of config.json to write, and the tokens at which the model stops.
        tensors: The HuggingFace tensors by name.
        weight_map: The file of each tensor.
        carried: The tensors of the template that are copied, by name.
        carried_notes: The checkpoint's notes on them; None to copy them as they are.
        notes: Further small files by name: the model card of a run's checkpoint.
    """

    checkpoint: ModelSource
    template: Path
    stops: StopTokens
    tensors: Mapping[str, TensorSpec]
    weight_map: Mapping[str, str]
    carried: Mapping[str, HFTensor]
    carried_notes: Notes | None
    notes: Mapping[str, bytes]


def plan_export(
    megatron: str | Path,
    hf_template: str | Path,
    *,
    iteration: str | int | None = None,
    dtype: str = "source",
    max_shard_size: str | int | None = None,
    ignore_arguments: bool = False,
    base: str | Path | None = None,
    any_base: bool = False,
    any_carried: bool = False,
    base_id: HubId | None = None,
) -> ExportPlan:
    """Check a checkpoint against a template; no tensor is read.

    Args:
        megatron, hf_template, iteration, dtype, max_shard_size, ignore_arguments, base, any_base,
            any_carried, base_id: As in `megatron_to_hf`.

    Raises:
        ConversionError: For anything that cannot be converted.
    """
    chosen = chosen_dtype(dtype)
    template = Path(hf_template)
    folder, config = _matched(megatron, template, iteration, ignore_arguments)
    checkpoint = _open(folder, config, template, base, any_base)
    tensors = tensor_specs(
        checkpoint.rules, lambda rule: chosen or checkpoint.dtypes[rule.megatron]
    )
    if chosen is None:
        tensors = in_fp32_as_in(template, tensors)
    carried = carried_to_export(template, config)
    noted = None if any_carried else read_notes(checkpoint.folder)
    if noted is not None:
        check_names(template, carried, noted, checkpoint.folder)
    weight_map = files_of(template, {**tensors, **carried}, max_shard_size)
    artifacts(template)
    written = for_every_reader(with_dtype(config, tensors))
    stops = plan_stop_tokens(template, written, trained_turn_end(checkpoint.folder))
    cards = card_files(read_facts(checkpoint.folder), template, base_id=base_id)
    return ExportPlan(checkpoint, template, stops, tensors, weight_map, carried, noted, cards)


def _matched(
    megatron: str | Path, template: Path, iteration: str | int | None, ignore_arguments: bool
) -> tuple[Path, Config]:
    """Return the folder of a checkpoint and the content of the template's config.json, which it fits."""
    config = read_hf_config(template)
    if not ignore_arguments:
        check_checkpoint_matches(Path(megatron), config, template, iteration)
    return find_checkpoint(megatron, iteration), config


def _open(
    folder: Path, config: Config, template: Path, base: str | Path | None, any_base: bool
) -> ModelSource:
    """Return a checkpoint of whole weights, or one of adapters with its base."""
    saved = saved_adapters(folder)
    if saved is not None:
        from checkpoint_conversion.adapters.export import open_merged  # needs numpy

        return open_merged(
            folder, saved, config, template, None if base is None else Path(base), any_base
        )
    if base is not None or any_base:
        raise ConversionError(
            f"{folder} holds whole weights: --base and --any-base are for adapters"
        )
    return open_checkpoint(folder, rules_in(template, config))


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
    base: str | Path | None = None,
    any_base: bool = False,
    any_carried: bool = False,
    base_id: HubId | None = None,
) -> ExportPlan:
    """Convert a Megatron torch_dist checkpoint to a HuggingFace folder.

    Args:
        megatron: Megatron's save folder, or a checkpoint in it.
        hf_template: HuggingFace folder of the same architecture.
        out: Folder to write; it appears whole or not at all.
        iteration: A number or "release"; None for the latest.
        dtype: "source" (as in the checkpoint, and fp32 where a template of half precision has fp32), "fp32",
            "bf16" or "fp16".
        max_shard_size: For example "5GB". None: the files of the template when it has an index, else at
            most 5 GB each.
        ignore_arguments: Do not compare the arguments that the checkpoint keeps with the template.
        overwrite: Replace an earlier output in `out`.
        check_finite: Refuse NaN and infinity.
        workers: Number of threads; None for one per core, at most 8.
        progress: Stream for progress lines.
        base: The Megatron checkpoint that adapters are merged into; None for the template's weights.
        any_base: Merge adapters into another base than the run noted, too.
        any_carried: Take the carried tensors of the template, for example its vision tower, even if the
            checkpoint notes other ones.
        base_id: The base on the hub for the model card; None for the one that the run noted.

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
        base=base,
        any_base=any_base,
        any_carried=any_carried,
        base_id=base_id,
    )
    sources = [plan.template, plan.checkpoint.folder]
    with (
        whole_folder(Path(out), sources, overwrite, COMMAND, plan.nbytes) as folder,
        HFWriter(folder, plan.all_tensors, plan.weight_map) as writer,
    ):
        copy_carried(plan.carried, plan.carried_notes, writer)
        write_tensors(plan.checkpoint, plan.tensors, writer, check_finite, workers, progress)
        copy_artifacts(plan.template, folder, plan.stops)
        write_files(folder, plan.notes)
    return plan


def export_adapter(
    megatron: str | Path,
    hf_template: str | Path,
    out: str | Path,
    *,
    iteration: str | int | None = None,
    dtype: str = "source",
    ignore_arguments: bool = False,
    overwrite: bool = False,
    check_finite: bool = False,
    workers: int | None = None,
    progress: TextIO | None = None,
    base: str | Path | None = None,
    any_base: bool = False,
    base_id: HubId | None = None,
    dry_run: bool = False,
) -> AdapterOutput:
    """Write the adapters of a checkpoint as a PEFT folder.

    Args:
        megatron, hf_template, out, iteration, dtype, ignore_arguments, overwrite, check_finite, workers,
            progress, base, any_base, base_id: As in `megatron_to_hf`. The PEFT folder names the template as
            its base.
        dry_run: Check everything and write nothing.

    Returns:
        The output.

    Raises:
        ConversionError: The checkpoint holds no adapters, or ones of another model, or cannot be converted.
    """
    from checkpoint_conversion.adapters.export import check_base, check_named_model, open_adapters
    from checkpoint_conversion.adapters.peft_folder import plan_adapter_output

    template = Path(hf_template)
    folder, config = _matched(megatron, template, iteration, ignore_arguments)
    saved = saved_adapters(folder)
    if saved is None:
        raise ConversionError(
            f"{folder} holds whole weights and no adapters; leave --export-adapter out"
        )
    found = check_base(folder, saved, template, None if base is None else Path(base), any_base)
    if base is not None and not any_base:
        check_named_model(template, config, found)
    adapters = open_adapters(folder, config, saved.options)
    kind = chosen_dtype(dtype) or next(iter(adapters.dtypes.values()))
    output = plan_adapter_output(out, template, config, saved.options, kind, overwrite)
    notes = card_files(read_facts(folder), template, is_adapter=True, base_id=base_id)
    output = replace(output, notes=notes)
    if dry_run:
        return output
    with output.writer() as (_, writer):
        write_tensors(adapters, output.tensors, writer, check_finite, workers, progress)
    return output


def main() -> int:
    """Run the command; return its exit code."""
    parser = export_parser()
    options = parser.parse_args()
    if options.out is None and options.export_adapter is None:
        parser.error("give --out DIR, or --export-adapter DIR for a checkpoint of adapters")
    for name in ("max_shard_size", "any_carried"):
        if options.out is None and getattr(options, name):
            parser.error(f"--{name.replace('_', '-')} is about --out, which is missing")
    if options.push_public and options.push_to_hub is None:
        parser.error(f"--push-public is about {FLAG}, which is missing")
    if options.out is not None and options.export_adapter is not None:
        check_apart(Path(options.out), Path(options.export_adapter))
    base = _base_of_uploaded_adapters(options)
    repository = None
    if options.push_to_hub is not None and not options.dry_run:
        repository = check_upload(options.push_to_hub, public=options.push_public)
    if options.out is not None:
        if options.export_adapter is not None:
            _export_adapter(options, check_only=True)
        _export_model(options)
    if options.export_adapter is not None:
        _export_adapter(options)
    if repository is not None:
        print(f"uploaded: {upload(Path(options.out or options.export_adapter), repository, base)}")
    return 0


def _base_of_uploaded_adapters(options: argparse.Namespace) -> HubId | None:
    """Return the base that uploaded adapters name; None for whole weights, or without an upload."""
    if options.push_to_hub is None or options.out is not None:
        return None
    facts = read_facts(find_checkpoint(options.megatron, options.iteration))
    known = options.base_model_id or base_on_hub(facts, Path(options.hf_template))
    return check_named_base(known, options.hf_template)


def _source_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that say which checkpoint is exported, and what it must fit, by name."""
    names = ("iteration", "ignore_arguments", "base", "any_base")
    return {name: getattr(options, name) for name in names} | {"base_id": options.base_model_id}


def _export_model(options: argparse.Namespace) -> None:
    chosen = {
        **_source_options(options),
        "max_shard_size": options.max_shard_size,
        "any_carried": options.any_carried,
    }
    if options.dry_run:
        plan = plan_export(options.megatron, options.hf_template, dtype=options.dtype, **chosen)
        print_export(plan, worker_count(options.workers))
        if plan.stops.added is not None:
            print(plan.stops)
        return
    plan = megatron_to_hf(
        options.megatron,
        options.hf_template,
        options.out,
        progress=sys.stderr,
        **chosen,
        **cli.output_options(options),
    )
    if plan.carried:
        print(description(plan.carried))
    if plan.stops.added is not None:
        print(plan.stops)
    if plan.checkpoint.padding:
        print(f"left out: {plan.checkpoint.padding} rows that pad the vocabulary")
    print(
        f"{len(plan.all_tensors)} tensors, {human(plan.nbytes)} of {plan.checkpoint.folder} "
        f"written to {options.out}; use it with: "
        f"AutoModelForCausalLM.from_pretrained({options.out!r})"
    )
    if (facts := read_facts(plan.checkpoint.folder)) is not None:
        print("\n".join(next_steps(Path(options.out), plan.template, day=facts.day)))


def _export_adapter(options: argparse.Namespace, *, check_only: bool = False) -> None:
    output = export_adapter(
        options.megatron,
        options.hf_template,
        options.export_adapter,
        progress=sys.stderr,
        dry_run=options.dry_run or check_only,
        **_source_options(options),
        **cli.output_options(options),
    )
    if check_only:
        return
    if options.dry_run:
        print_adapters(output)
        return
    print(
        f"{len(output.tensors)} tensors of adapters, {human(output.nbytes)}, written to "
        f"{options.export_adapter}; use them with: PeftModel.from_pretrained(model, "
        f"{options.export_adapter!r})"
    )
    if GENERATION_CONFIG in output.notes:
        print(
            f"{GENERATION_CONFIG} of {options.export_adapter} names the token that ends a turn in training, "
            "which the base's does not name: give it to the program that generates"
        )
    if output.notes:
        facts = read_facts(find_checkpoint(options.megatron, options.iteration))
        base, rank = Path(options.hf_template), output.options.rank
        steps = next_steps(output.folder, base, day=None if facts is None else facts.day, rank=rank)
        print("\n".join(steps))


if __name__ == "__main__":
    cli.run(main)
