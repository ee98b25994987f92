"""A HuggingFace folder that several processes fill at once with the shards of a model in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from checkpoint_conversion.engine.output import check_output, whole_folder, write_files
from checkpoint_conversion.families import TensorRule
from checkpoint_conversion.hf.carried import Notes, carried_to_export, check_names, copy_carried
from checkpoint_conversion.hf.folder import HFTensor, list_tensors, read_hf_config
from checkpoint_conversion.hf.model import row_views, rules_in
from checkpoint_conversion.hf.plan import (
    COMMAND,
    files_of,
    for_every_reader,
    in_fp32_as_in,
    tensor_specs,
    with_dtype,
)
from checkpoint_conversion.hf.stop_tokens import StopTokens, plan_stop_tokens
from checkpoint_conversion.hf.torch_tensors import from_torch
from checkpoint_conversion.hf.writer import (
    HFWriter,
    ModelSizes,
    TensorSpec,
    artifacts,
    copy_artifacts,
)


@dataclass(frozen=True)
class HFOutput(ModelSizes):
    """A folder to write, and everything about it except the values.

    Attributes:
        folder: The folder to write; missing or empty.
        template: HuggingFace folder that gives everything but the weights.
        stops: The content of config.json to write, and the tokens at which the model stops.
        rules: The name table.
        tensors: The tensors by name.
        weight_map: The file of each tensor.
        overwrite: Whether an earlier output in its place is replaced.
        carried: The tensors of the template that are copied, by name.
        carried_notes: The notes to compare them with; None to copy them as they are.
        notes: Further small files by name, for example a model card.
    """

    folder: Path
    template: Path
    stops: StopTokens
    rules: tuple[TensorRule, ...]
    tensors: Mapping[str, TensorSpec]
    weight_map: Mapping[str, str]
    overwrite: bool = False
    carried: Mapping[str, HFTensor] = field(default_factory=dict)
    carried_notes: Notes | None = None
    notes: Mapping[str, bytes] = field(default_factory=dict)

    def stopping_at(self, turn_end: int | None) -> HFOutput:
        """Return this output for a model that ends a turn with the token `turn_end`, or with text if None."""
        stops = plan_stop_tokens(self.template, self.stops.config, turn_end)
        return replace(self, stops=stops)

    def noting(self, notes: Notes, checkpoint: Path | None = None) -> HFOutput:
        """Return this output with notes that the tensors it copies are compared with.

        Args:
            notes: The notes.
            checkpoint: The checkpoint that they are from; None if they were made of the template.

        Raises:
            ConversionError: The notes list other tensors than the template has.
        """
        check_names(self.template, self.carried, notes, checkpoint or self.template)
        return replace(self, carried_notes=notes)

    @contextlib.contextmanager
    def create(self) -> Iterator[Path]:
        """Yield a temporary folder with the headers of all tensors, to be filled in the block.

        `hf.shards.write_shard` fills it. It becomes the output when the block ends without an error.
        One process enters this block. Meanwhile others may write into the folder, on any machine.

        Raises:
            ConversionError: When the folder must not be written, or there is too little space.
        """
        place = whole_folder(self.folder, [self.template], self.overwrite, COMMAND, self.nbytes)
        with place as partial:
            with HFWriter(partial, self.all_tensors, self.weight_map) as writer:
                copy_carried(self.carried, self.carried_notes, writer)
                writer.flush()
            yield partial
            copy_artifacts(self.template, partial, self.stops)
            write_files(partial, self.notes)

    def tensors_in(self, folder: Path) -> dict[str, HFTensor]:
        """Return the places of the tensors in the temporary folder of `create`."""
        return row_views(list_tensors(folder), self.rules)


def plan_output(
    folder: str | Path, template: str | Path, dtype: torch.dtype, overwrite: bool = False
) -> HFOutput:
    """Check that a folder can be written in the likeness of a template; no file is written yet.

    Args:
        folder: The folder to write.
        template: HuggingFace folder of the same architecture.
        dtype: The dtype of the tensors, except for the ones that `in_fp32_as_in` finds.
        overwrite: Whether an earlier output in this place may be replaced, if it was not changed since.

    Raises:
        ConversionError: When the folder is not empty, its place is not writable, there is too little
            space, or the template cannot be used.
    """
    folder, template = Path(folder), Path(template)
    config = read_hf_config(template)
    rules = rules_in(template, config)
    carried = carried_to_export(template, config)
    kind = from_torch(dtype)
    tensors = in_fp32_as_in(template, tensor_specs(rules, lambda _: kind))
    weight_map = files_of(template, {**tensors, **carried})
    artifacts(template)
    written = for_every_reader(with_dtype(config, tensors))
    stops = plan_stop_tokens(template, written, None)
    output = HFOutput(folder, template, stops, rules, tensors, weight_map, overwrite, carried)
    check_output(folder, [template], overwrite, COMMAND, output.nbytes)
    return output
