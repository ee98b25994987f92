"""Compare a HuggingFace folder with a Megatron checkpoint, or two HuggingFace folders.

The comparison is bit by bit, or by the logits that the models give.

    python -m checkpoint_conversion.verify --hf DIR --megatron DIR
    python -m checkpoint_conversion.verify --hf DIR DIR
    python -m checkpoint_conversion.verify --hf DIR --megatron DIR --logits

Exit code: 0 when all tensors are equal (the logits within the tolerance), 1 when they differ, 2 when an
input cannot be read.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from checkpoint_conversion import cli
from checkpoint_conversion.adapters.saved import check_comparable
from checkpoint_conversion.engine.raw_files import OpenFiles
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.carried import Notes, notes_on, read_notes
from checkpoint_conversion.hf.chunks import CHUNK_BYTES
from checkpoint_conversion.hf.folder import HFTensor
from checkpoint_conversion.hf.model import HFModel, open_hf_model
from checkpoint_conversion.progress import ProgressLine
from checkpoint_conversion.torch_dist.folder import find_checkpoint
from checkpoint_conversion.torch_dist.reader import open_checkpoint
from checkpoint_conversion.torch_dist.saved_arguments import check_checkpoint_matches

if TYPE_CHECKING:  # the command's help needs no torch
    import torch

TOLERANCE = 1e-3
# What differs where the fields of a note on a carried tensor do.
_NOTED = ("dtype", "shape", "values")


class RowRange(NamedTuple):
    """The same rows of a tensor on both sides, each in its own dtype."""

    name: str
    left: torch.Tensor
    right: torch.Tensor


@dataclass
class Difference:
    """A difference of a tensor (or a configuration value).

    Attributes:
        what: "values", "dtype", "shape", "missing" or "config".
        detail: Both values, or the number of elements that differ and by how much.
    """

    name: str
    what: str
    detail: str


@dataclass
class Report:
    """The result of a comparison."""

    tensors: int
    nbytes: int
    differences: list[Difference]


def verify(
    hf: str | Path,
    other_hf: str | Path | None = None,
    *,
    megatron: str | Path | None = None,
    iteration: str | int | None = None,
    ignore_arguments: bool = False,
    progress: TextIO | None = None,
) -> Report:
    """Compare a HuggingFace folder with another one, or with a Megatron checkpoint.

    Rows that pad a Megatron vocabulary are not compared.

    Args:
        hf: HuggingFace folder.
        other_hf: Second HuggingFace folder; or
        megatron: Megatron's save folder, or a checkpoint in it.
        iteration: A number or "release"; None for the latest.
        ignore_arguments: Do not compare the arguments that the checkpoint keeps with config.json.
        progress: Stream for progress lines.

    Raises:
        ConversionError: When an input cannot be read, is incomplete or is of another architecture.
    """
    if (other_hf is None) == (megatron is None):
        raise ConversionError(
            "give a second HuggingFace folder or a Megatron checkpoint, one of them"
        )
    left = open_hf_model(hf)
    left.check_alias()
    if megatron is not None:
        if not ignore_arguments:
            check_checkpoint_matches(Path(megatron), left.config, left.folder, iteration)
        differences: list[Difference] = []
        checkpoint = find_checkpoint(megatron, iteration)
        rows, noted = _rows_of_checkpoint(left, checkpoint), read_notes(checkpoint)
    else:
        right = open_hf_model(other_hf or "")
        right.check_alias()
        differences = _structural(left, right)
        skipped = {difference.name for difference in differences}
        rows, noted = _rows_of_folders(left, right, skipped), notes_on(right.carried)
    names = left.names()
    nbytes = sum(left.tensors[name].nbytes for name in names)
    counter = ProgressLine(len(names), nbytes, progress)
    differences += _compare(rows, counter)
    counter.finish()
    if noted is None:  # of a checkpoint without notes: there is no other side
        return Report(len(names), nbytes, differences)
    differences += _carried(left, noted, Path(megatron or other_hf or ""))
    nbytes += sum(tensor.nbytes for tensor in left.carried.values())
    return Report(len(names) + len(left.carried), nbytes, differences)


def _carried(model: HFModel, noted: Notes, other: Path) -> Iterator[Difference]:
    """Yield the differences of the tensors that are carried along, by their checksums."""
    own = notes_on(model.carried)
    for name in own | dict(noted):
        if name not in own or name not in noted:
            yield Difference(name, "missing", f"in {other if name in own else model.folder}")
            continue
        for what, one, there in zip(_NOTED, own[name], noted[name], strict=True):
            if one != there:
                yield Difference(name, what, f"{one} / {there}")


def _rows_of_checkpoint(model: HFModel, folder: Path) -> Iterator[RowRange]:
    from checkpoint_conversion.hf.torch_tensors import TORCH, read_chunk

    check_comparable(folder)
    checkpoint = open_checkpoint(folder, model.rules)
    chunks = (chunk for rule in checkpoint.rules for chunk in checkpoint.chunks(rule))
    with OpenFiles() as files:
        for chunk in chunks:
            dtype = TORCH[checkpoint.dtypes[chunk.key].name]
            values = read_chunk(checkpoint, chunk, dtype, files).view(chunk.rows, -1)
            for source, start, rows in chunk.layout:
                tensor = model.tensors[chunk.piece.hf[source]]
                yield RowRange(tensor.name, _read(tensor, start, rows, files), values[:rows])
                values = values[rows:]


def _rows_of_folders(left: HFModel, right: HFModel, skipped: set[str]) -> Iterator[RowRange]:
    with OpenFiles() as files:
        for name in (name for name in left.names() if name not in skipped):
            one, other = left.tensors[name], right.tensors[name]
            step = max(1, CHUNK_BYTES // one.row_bytes)
            for start in range(0, one.shape[0], step):
                part = start, min(step, one.shape[0] - start), files
                yield RowRange(name, _read(one, *part), _read(other, *part))


def _read(tensor: HFTensor, start: int, rows: int, files: OpenFiles) -> torch.Tensor:
    """Return rows of a tensor as a matrix."""
    import torch

    from checkpoint_conversion.hf.torch_tensors import TORCH, tensor_bytes

    width = tensor.row_bytes // TORCH[tensor.dtype].itemsize
    result = torch.empty((rows, width), dtype=TORCH[tensor.dtype])
    tensor.read_rows_from(files, start, rows, tensor_bytes(result))
    return result


def _structural(left: HFModel, right: HFModel) -> list[Difference]:
    """Return the differences between two folders that need no tensor data."""
    one, other = (m.family.megatron_arguments(m.config) for m in (left, right))
    found = [
        Difference(key, "config", f"{one.get(key)} / {other.get(key)}")
        for key in one | other
        if one.get(key) != other.get(key)
    ]
    names, other_names = (dict.fromkeys(model.names()) for model in (left, right))
    for name in names | other_names:
        if name not in names or name not in other_names:
            side = right if name in names else left
            found.append(Difference(name, "missing", f"in {side.folder}"))
        elif left.tensors[name].shape != right.tensors[name].shape:
            shapes = (str(list(m.tensors[name].shape)) for m in (left, right))
            found.append(Difference(name, "shape", " / ".join(shapes)))
    return found


@dataclass
class _Count:
    """The differences found in one tensor so far."""

    dtypes: str = ""
    elements: int = 0
    of: int = 0
    largest: float = 0.0
    nan: int = 0

    def differences(self, name: str) -> Iterator[Difference]:
        if self.dtypes:
            yield Difference(name, "dtype", self.dtypes)
        if self.elements:
            parts = [f"{self.elements} of {self.of}"]
            parts += [f"by up to {self.largest:.3g}"] * (self.elements > self.nan)
            parts += [f"NaN in {self.nan}"] * (self.nan > 0)
            yield Difference(name, "values", ", ".join(parts))


def _compare(pairs: Iterator[RowRange], counter: ProgressLine) -> list[Difference]:
    import torch

    bits_of = {2: torch.int16, 4: torch.int32}
    counts: dict[str, _Count] = {}
    for name, left, right in pairs:
        count = counts.setdefault(name, _Count())
        counter.add(name, left.nbytes)
        count.of += left.numel()
        if left.dtype != right.dtype:
            count.dtypes = f"{left.dtype} / {right.dtype}".replace("torch.", "")
            left, right = left.float(), right.float()
        bits = bits_of[left.dtype.itemsize]
        different = left.view(bits) != right.view(bits)
        if different.any():
            distances = (left[different].float() - right[different].float()).abs()
            known = distances[~distances.isnan()]
            count.elements += len(distances)
            count.nan += len(distances) - len(known)
            if len(known):
                count.largest = max(count.largest, known.max().item())
    return [found for name, count in counts.items() for found in count.differences(name)]


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog=cli.program("checkpoint_conversion.verify"), formatter_class=cli.FlagHelp
    )
    parser.add_argument(
        "--hf", required=True, nargs="+", action="extend", metavar="DIR", help="one or two folders"
    )
    parser.add_argument("--megatron", metavar="DIR", help="Megatron save folder")
    parser.add_argument("--iteration", metavar="N", help="a number or 'release' (default: latest)")
    parser.add_argument("--ignore-arguments", action="store_true", help=cli.IGNORE_ARGUMENTS)
    parser.add_argument(
        "--logits",
        action="store_true",
        help="compare logits, in fp32 on the CPU: of transformers for --hf; of Megatron for --megatron, or "
        "for the same folder where nothing else is given",
    )
    parser.add_argument("--prompts", metavar="FILE", help="prompts for --logits, one to a line")
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"largest difference of two logits (default: {TOLERANCE:g})",
    )
    options = parser.parse_args()
    if len(options.hf) > 2:
        parser.error("--hf takes one or two folders")
    for name in ("iteration", "ignore_arguments"):
        if getattr(options, name) and options.megatron is None:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} is a checkpoint's; give --megatron, or drop it")
    if options.ignore_arguments and options.logits:
        parser.error("--ignore-arguments is about comparing tensors; drop it, or --logits")
    for name in ("prompts", "tolerance"):
        if getattr(options, name) is not None and not options.logits:
            parser.error(f"--{name} is for logits; give --logits, or drop it")
    if options.tolerance is None:
        options.tolerance = TOLERANCE
    if not 0 <= options.tolerance < math.inf:
        parser.error(f"--tolerance {options.tolerance:g} must be a finite number, 0 or larger")
    return _verify_logits(options) if options.logits else _verify_tensors(options)


def _verify_logits(options: argparse.Namespace) -> int:
    from checkpoint_conversion.logits import PROMPTS, compare_logits, read_prompts

    if len(options.hf) == 2 and options.megatron is not None:
        raise ConversionError("give a second HuggingFace folder or a Megatron checkpoint, not both")
    report = compare_logits(
        *options.hf,
        megatron=options.megatron,
        iteration=options.iteration,
        prompts=PROMPTS if options.prompts is None else read_prompts(options.prompts),
    )
    print(report)
    return 0 if report.max_difference <= options.tolerance else 1


def _verify_tensors(options: argparse.Namespace) -> int:
    report = verify(
        *options.hf,
        megatron=options.megatron,
        iteration=options.iteration,
        ignore_arguments=options.ignore_arguments,
        progress=sys.stderr,
    )
    if not report.differences:
        print(f"equal: {report.tensors} tensors, {report.nbytes} bytes")
        return 0
    rows = [(d.name, d.what, d.detail) for d in report.differences]
    cli.print_table(("name", "difference", "detail"), rows)
    names = {difference.name for difference in report.differences}
    print(f"different: {len(names)} of {report.tensors} tensors")
    return 1


if __name__ == "__main__":
    cli.run(main)
