"""Adapters of experts in the joined form that PEFT writes with transformers 5.

transformers 5 holds the experts of a layer in two tensors, and PEFT has one A and one B for each of them:

| tensor of the layer | A | B | name in the folder, after `mlp.experts` |
|---|---|---|---|
| gate_up_proj [E, 2 I, H] | [E r, H] | [2 I, r E] | `.base_layer.lora_A.weight` |
| down_proj [E, H, I] | [E r, I] | [H, r E] | `.lora_A.weight` |

If only one of the two has adapters, their names have no `.base_layer`. Expert e has the rows
[e r, (e + 1) r) of A and the columns e, e + E, e + 2 E, … of B. So each expert's factors are a part of the
joined ones, and gate and up are the two halves of B's rows. Their A is the same one. Or, at twice the rank,
each has its own half of it: PEFT makes this of adapters for each expert.

Letters: E experts, r rank, H hidden size, I size of an expert.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from checkpoint_conversion.adapters.options import A_END, B_END, PREFIX
from checkpoint_conversion.engine.dtypes import DTYPES
from checkpoint_conversion.engine.raw_files import OpenFiles
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import TensorRule
from checkpoint_conversion.hf.folder import HFTensor
from checkpoint_conversion.hf.model import check_tensors

_INNER = ".base_layer"
# Joined tensors that are kept: the experts of a layer are read one after the other.
_KEPT = 2


@dataclass(frozen=True)
class _Kept:
    """The joined tensors that were read last."""

    tensors: OrderedDict[str, np.ndarray] = field(default_factory=OrderedDict)

    def of(self, tensor: HFTensor, files: OpenFiles) -> np.ndarray:
        """Return the bits of a matrix [rows, columns]."""
        found = self.tensors.get(tensor.name)
        if found is None:
            data = bytearray(tensor.nbytes)
            tensor.read_rows_from(files, 0, tensor.shape[0], memoryview(data))
            found = np.frombuffer(data, DTYPES[tensor.dtype].bits).reshape(tensor.shape)
            self.tensors[tensor.name] = found
            while len(self.tensors) > _KEPT:
                self.tensors.popitem(last=False)
        return found


@dataclass(frozen=True)
class ExpertB(HFTensor):
    """The B of one expert's projection, as a part of a joined B.

    Attributes:
        joined: The joined B.
        first_row: Its first row there.
        columns: Its columns there.
        kept: Joined tensors that were read.
    """

    joined: HFTensor
    first_row: int
    columns: slice
    kept: _Kept

    def read_rows_from(self, files: OpenFiles, start: int, rows: int, into: memoryview) -> None:
        """Read rows [start, start + rows) into a buffer of that size."""
        first = self.first_row + start
        bits = self.kept.of(self.joined, files)[first : first + rows, self.columns]
        into[: bits.nbytes] = np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data


@dataclass(frozen=True)
class _Experts:
    """The experts of a layer: the name of their module, their number, H and I."""

    module: str
    count: int
    hidden: int
    ffn: int


@dataclass(frozen=True)
class _Joined:
    """The factors of a joined tensor in a folder.

    Attributes:
        experts: The experts of the layer.
        projections: Their projections in it, in the order of B's rows.
        a, b: The factors.
    """

    experts: _Experts
    projections: tuple[str, ...]
    a: HFTensor
    b: HFTensor

    @property
    def rank(self) -> int:
        """Rank of each expert in it."""
        return self.a.shape[0] // self.experts.count

    def check(self, folder: Path) -> None:
        """Check the shapes; raises as `check_tensors`."""
        ffn, hidden, count = self.experts.ffn, self.experts.hidden, self.experts.count
        rows, columns = (hidden, ffn) if self.projections == ("down_proj",) else (2 * ffn, hidden)
        rank = max(1, self.rank)
        expected = {self.a.name: (rank * count, columns), self.b.name: (rows, rank * count)}
        check_tensors(folder, {t.name: t for t in (self.a, self.b)}, expected)

    def is_split(self, kept: _Kept) -> bool:
        """Whether each projection uses only its own part of the columns of B."""
        with OpenFiles() as files:
            bits = kept.of(self.b, files)
        parts = len(self.projections)
        magnitudes = bits & (np.iinfo(bits.dtype).max >> 1)  # without the sign: -0 is a zero
        blocks = magnitudes.reshape(parts, len(bits) // parts, parts, -1)
        return not any(blocks[i, :, j].any() for i in range(parts) for j in range(parts) if i != j)

    def parts(self, rank: int, kept: _Kept) -> Iterator[HFTensor]:
        """Yield the factors of each expert's projections, of a rank."""
        shares = self.rank // rank  # of the columns; 1 where the projections share A
        count, rows = self.experts.count, self.b.shape[0] // len(self.projections)
        for expert in range(count):
            for number, projection in enumerate(self.projections):
                own = number if shares > 1 else 0
                name = f"{PREFIX}{self.experts.module}.{expert}.{projection}"
                first = expert * self.rank + own * rank
                offset = self.a.offset + first * self.a.row_bytes
                shape = (rank, self.a.shape[1])
                yield HFTensor(name + A_END, self.a.file, self.a.dtype, shape, offset)
                columns = slice(own * rank * count + expert, (own + 1) * rank * count, count)
                yield ExpertB(
                    *(name + B_END, self.b.file, self.b.dtype, (rows, rank), self.b.offset),
                    *(self.b, number * rows, columns, kept),
                )


@dataclass(frozen=True)
class JoinedExperts:
    """The joined factors in a folder, which may be none."""

    folder: Path
    found: tuple[_Joined, ...]

    def __bool__(self) -> bool:
        """Whether the folder holds any."""
        return bool(self.found)

    @property
    def names(self) -> frozenset[str]:
        """Names of the joined factors."""
        return frozenset(t.name for joined in self.found for t in (joined.a, joined.b))

    @property
    def projections(self) -> frozenset[str]:
        """Names of the projections that they are for."""
        return frozenset(name for joined in self.found for name in joined.projections)

    @property
    def gate_up_rank(self) -> int | None:
        """Rank of the factors of gate_up_proj; None without any."""
        ranks = {joined.rank for joined in self.found if len(joined.projections) > 1}
        return max(ranks, default=None)

    def separate(self, tensors: Mapping[str, HFTensor], rank: int) -> dict[str, HFTensor]:
        """Return the tensors of the folder with factors of each expert's projections in place of joined ones.

        Args:
            tensors: The tensors of the folder, by name.
            rank: Rank of all adapters.

        Raises:
            ConversionError: A joined tensor has another shape or rank, or gate and up use each other's part.
        """
        kept = _Kept()
        names = self.names
        separate = {name: tensor for name, tensor in tensors.items() if name not in names}
        for joined in self.found:
            joined.check(self.folder)
            self._check_rank(joined, rank, kept)
            separate |= {part.name: part for part in joined.parts(rank, kept)}
        return separate

    def _check_rank(self, joined: _Joined, rank: int, kept: _Kept) -> None:
        several = len(joined.projections)
        if joined.rank == rank or (joined.rank == several * rank and joined.is_split(kept)):
            return
        raise ConversionError(
            f"{joined.a.file}: {joined.a.name} has rank {joined.rank} in each expert, and the other adapters "
            f"have rank {rank}; all need the same. Merge the adapters with PEFT (merge_and_unload) and go on "
            "from the merged model, or train them with target_parameters=['mlp.experts.gate_up_proj', "
            "'mlp.experts.down_proj'], which gives all the rank r"
        )


def joined_experts(
    folder: Path, tensors: Mapping[str, HFTensor], rules: Sequence[TensorRule]
) -> JoinedExperts:
    """Find the joined factors among the tensors of a folder.

    Args:
        folder: The folder.
        tensors: Its tensors, by name.
        rules: The name table of the model.

    Raises:
        ConversionError: One of two factors is missing, or is no matrix.
    """
    found: list[_Joined] = []
    for experts in _experts(rules):
        inner, outer = (
            [tensors.get(f"{PREFIX}{experts.module}{part}{end}") for end in (A_END, B_END)]
            for part in (_INNER, "")
        )
        single = not any(inner)
        for (a, b), is_inner in ((inner, True), (outer, False)):
            if _are_matrices(folder, a, b):
                assert a is not None
                assert b is not None
                is_gate_up = is_inner or (single and b.shape[0] == 2 * experts.ffn)
                names = ("gate_proj", "up_proj") if is_gate_up else ("down_proj",)
                found.append(_Joined(experts, names, a, b))
    return JoinedExperts(folder, tuple(found))


def _are_matrices(folder: Path, a: HFTensor | None, b: HFTensor | None) -> bool:
    """Return whether there are an A and a B, both with two axes.

    Raises:
        ConversionError: Only one is there, or has two axes.
    """
    for tensor, other in ((a, b), (b, a)):
        if tensor is not None and (other is None or len(tensor.shape) != 2):
            raise ConversionError(
                f"{folder}: {tensor.name} {list(tensor.shape)} needs two axes, and its other factor"
            )
    return a is not None


def _experts(rules: Sequence[TensorRule]) -> Iterator[_Experts]:
    for rule in rules:
        if "expert" in rule.axes and len(rule.hf) > 1:  # gate and up
            ffn, hidden = next(iter(rule.hf.values()))
            modules = (piece.hf[0].rsplit(".", 3)[0] for piece in rule.pieces())
            for module in dict.fromkeys(modules):
                yield _Experts(module, rule.axes["expert"], hidden, ffn)
