"""Where the projections of HuggingFace lie in the weights of a rank.

Megatron joins projections in one weight and splits it over ranks. A model's `sharded_state_dict` says which
block of which global tensor each parameter is, and the name tables of `checkpoint_conversion` say which rows
of which HuggingFace weights such a block holds. Both together place the adapters, whatever family and layout.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.transformer.module import MegatronModule

from checkpoint_conversion.adapters.options import rows_of_b
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import TensorRule
from checkpoint_conversion.families.layouts import rows_of
from checkpoint_conversion.hf.shards import Rules, Shard

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Span:
    """A part of an axis: [start, start + size) of `total`."""

    start: int
    size: int
    total: int

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the axis."""
        return self.size == self.total


@dataclass(frozen=True)
class Run:
    """Rows [start, start + rows) of a HuggingFace weight, from row `local` on in a rank's parameter.

    Where a checkpoint has some rows of the weight as a tensor of its own, as `in_proj.weight.query`, the rows
    are the tensor's, and `part` is the end of its key, `.query`.
    """

    weight: str
    start: int
    rows: int
    local: int
    part: str = ""


@dataclass(frozen=True)
class LocalWeight:
    """A weight of a linear layer on this rank.

    Attributes:
        module: Name of the linear layer in the model.
        parameter: Its weight.
        key: Key of the weight in a checkpoint, without the end for a part of it.
        lead: Position and size of each axis on which a checkpoint stacks it: layers, and experts.
        replica: Megatron's replica id of the parameter, with 0 for its tensor-parallel rank.
        runs: The HuggingFace rows of all its rows, in their order.
        columns: The columns that this rank holds.
        rows: Rows of each HuggingFace weight in it, by name and part.
        is_expert: Whether it is a routed expert's.
    """

    module: str
    parameter: torch.nn.Parameter
    key: str
    lead: tuple[tuple[int, int], ...]
    replica: tuple[int, ...]
    runs: tuple[Run, ...]
    columns: Span
    rows: dict[tuple[str, str], int]
    is_expert: bool

    def spans_of(self, weight: str) -> dict[str, Span]:
        """Return the rows of a HuggingFace weight that are in this one, by part of the weight.

        Raises:
            ConversionError: They are not one run of the part.
        """
        parts = dict.fromkeys(run.part for run in self.runs if run.weight == weight)
        return {part: self._span_of(weight, part) for part in parts}

    def _span_of(self, weight: str, part: str) -> Span:
        runs = (run for run in self.runs if (run.weight, run.part) == (weight, part))
        own = sorted((run.start, run.rows) for run in runs)
        end = first = own[0][0]
        for start, rows in own:
            if start != end:
                raise ConversionError(
                    f"{self.module}: the rows of {weight} on this rank are not neighbours, so it cannot have "
                    "an adapter at this tensor-parallel size"
                )
            end += rows
        return Span(first, end - first, self.rows[weight, part])


@dataclass
class _Found:
    """The blocks of a parameter that have been seen."""

    items: list[ShardedTensor] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    rows: dict[tuple[str, str], int] = field(default_factory=dict)
    is_expert: bool = False


def local_weights(chunk: MegatronModule, rules: Iterable[TensorRule]) -> list[LocalWeight]:
    """Return the weights of a pipeline stage's linear layers, in the order of its modules.

    Args:
        chunk: The stage, before adapters are added to it.
        rules: The name table of the model.

    Raises:
        ConversionError: A tensor of the model has no place in the name table, or the stage keeps a matrix in
            another form than a matrix.
    """
    rules = tuple(rules)
    table, matrices = Rules(rules), _matrices(rules)
    owners = {
        parameter.untyped_storage().data_ptr(): (name, parameter)
        for name, parameter in chunk.named_parameters()
        if not parameter.is_meta
    }
    found: dict[str, _Found] = defaultdict(_Found)
    for item in sharded_tensors(chunk.sharded_state_dict()):
        owner = owners.get(item.data.untyped_storage().data_ptr())
        if owner is None or item.data.ndim != 2:
            if item.key in matrices:
                raise ConversionError(
                    f"the layers keep {item.key} in a form that cannot have adapters; drop "
                    "--init-model-with-meta-device and --moe-single-grouped-weight"
                )
            continue
        name, parameter = owner
        _add_runs(found[name], item, table, parameter)
    parameters = dict(chunk.named_parameters())
    return [_weight(name, parameters[name], found[name]) for name in parameters if name in found]


def _matrices(rules: Iterable[TensorRule]) -> frozenset[str]:
    """Return the keys of tensors that are matrices in each layer (and expert)."""
    return frozenset(key for rule in rules if len(rule.piece_shape) == 2 for key in rule.keys)


def sharded_tensors(content: dict[str, Any]) -> list[ShardedTensor]:
    """Return the tensors of a sharded state dict; gate and up, one parameter, are two of them."""
    apply_factories(content)
    return [item for item in nested_values(content) if isinstance(item, ShardedTensor)]


def rows_before(view: torch.Tensor, parameter: torch.Tensor) -> int:
    """Return the row of a parameter with which a view of some of its rows begins."""
    return int(view.storage_offset() - parameter.storage_offset()) // parameter.stride(0)


def _add_runs(
    found: _Found, item: ShardedTensor, table: Rules, parameter: torch.nn.Parameter
) -> None:
    found.items.append(item)
    shard = Shard(item.key, item.global_shape, item.global_offset, item.data)
    part = item.key.partition(_WEIGHT)[2]
    for block in table.blocks(shard):
        rule, names, own = block.chunk.rule, block.chunk.piece.hf, block.chunk.start
        found.is_expert = "expert" in rule.axes
        for name, of_rule in zip(names, rule.hf, strict=True):
            found.rows[name, part] = rows_of(rows_of_b(rule, of_rule))
        local = rows_before(block.values, parameter)
        for source, start, rows in block.chunk.layout:
            _append(found.runs, Run(names[source], own if part else start, rows, local, part))
            own, local = own + rows, local + rows


def _append(runs: list[Run], run: Run) -> None:
    """Add a run, as a part of the last one where it goes on with it."""
    last = runs[-1] if runs else None
    if (
        last is not None
        and (last.weight, last.part) == (run.weight, run.part)
        and (last.start + last.rows, last.local + last.rows) == (run.start, run.local)
    ):
        runs[-1] = replace(last, rows=last.rows + run.rows)
    else:
        runs.append(run)


def _weight(name: str, parameter: torch.nn.Parameter, found: _Found) -> LocalWeight:
    item = found.items[0]
    lead, replica = item.prepend_axis_num, item.replica_id
    assert isinstance(replica, tuple)
    module, weight, _ = item.key.partition(_WEIGHT)
    return LocalWeight(
        module=name.rpartition(".")[0],
        parameter=parameter,
        key=module + weight,
        lead=tuple(zip(item.global_offset[:lead], item.global_shape[:lead], strict=True)),
        replica=(replica[0], 0, *replica[2:]),
        runs=tuple(sorted(found.runs, key=lambda run: run.local)),
        columns=Span(item.global_offset[-1], item.data.shape[1], item.global_shape[-1]),
        rows=found.rows,
        is_expert=found.is_expert,
    )


def arrangement(
    weight: LocalWeight, chosen: Sequence[tuple[str, str]]
) -> tuple[tuple[int | None, int, int], ...]:
    """Return where the outputs of projections go in the output of the linear layer.

    Args:
        weight: The weight of the linear layer.
        chosen: The HuggingFace weights that have an adapter, each with a part of it.

    Returns:
        For each run of the output, in their order: the number of the projection in `chosen` or None, the
        first row of the run among the projection's rows on this rank, and the number of rows.
    """
    first = {(name, part): weight.spans_of(name)[part].start for name, part in chosen}
    return tuple(
        (chosen.index((run.weight, run.part)), run.start - first[run.weight, run.part], run.rows)
        if (run.weight, run.part) in first
        else (None, 0, run.rows)
        for run in weight.runs
    )
