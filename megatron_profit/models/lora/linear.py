"""The adapters of one linear layer: scale * B A x, split over ranks as the layer is.

A column-parallel layer has its A on every rank and its B split by rows. A row-parallel layer has its A split
by columns and its B on every rank. All communication is of [tokens, rank] tensors, between A and B.

| layer | between A and B | factor on every rank: its gradient |
|---|---|---|
| column-parallel | copy; its backward pass sums | complete on each rank |
| the same, sequence-parallel | all-gather; reduce-scatter backward | of its tokens: Megatron sums it |
| row-parallel | all-reduce; copy backward | complete on each rank |
| the same, sequence-parallel | reduce-scatter; all-gather backward | of its tokens: Megatron sums it |
| experts | none: the dispatcher of tokens sums outputs and gradients | summed here over the expert's ranks |

Shape suffixes: T tokens (or S, B), H inputs, R rank, O outputs; a factor [R, H] or [O, R].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
    get_expert_parallel_rng_tracker_name,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from checkpoint_conversion.adapters.options import LoraOptions, factor_keys, target_of
from megatron_profit.models.lora.placement import LocalWeight, Span, arrangement

Exchange = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parallelism:
    """How a linear layer is split over ranks.

    Attributes:
        group: The ranks that share it.
        splits_rows, splits_columns: Whether its outputs, or its inputs, are split.
        sequence_parallel: Whether each of these ranks holds a part of the tokens around it.
        is_expert: Whether it is a routed expert's.
    """

    group: ProcessGroup
    splits_rows: bool
    splits_columns: bool
    sequence_parallel: bool
    is_expert: bool

    @classmethod
    def of(cls, weight: LocalWeight, chosen: Sequence[str], sequence_parallel: bool) -> Parallelism:
        """Return the split of a weight of which the projections `chosen` have adapters."""
        expert = weight.is_expert
        group = (
            mpu.get_expert_tensor_parallel_group()
            if expert
            else mpu.get_tensor_model_parallel_group()
        )
        return cls(
            group,
            any(not rows.is_whole for name in chosen for rows in weight.spans_of(name).values()),
            not weight.columns.is_whole,
            sequence_parallel and not expert and group.size() > 1,
            expert,
        )

    @property
    def exchange(self) -> Exchange:
        """The function between A and B, on [T, R] of all projections."""
        group = self.group
        if self.is_expert or not (self.splits_rows or self.splits_columns):
            return lambda low: low
        if self.splits_rows and self.sequence_parallel:
            return lambda low: gather_from_sequence_parallel_region(
                low, tensor_parallel_output_grad=True, group=group
            )
        if self.splits_rows:
            return lambda low: copy_to_tensor_model_parallel_region(low, group=group)
        if self.sequence_parallel:
            return lambda low: reduce_scatter_to_sequence_parallel_region(low, group=group)
        return lambda low: reduce_from_tensor_model_parallel_region(low, group=group)

    def random_numbers(self) -> AbstractContextManager:
        """Return the random generator of a dropout: alike on all ranks where the inputs are.

        The ranks that share an expert hold the same tokens. Ranks of other experts hold other numbers of
        tokens, so the generator of the whole model must not be used here: tensor-parallel ranks may hold
        different experts.
        """
        if self.is_expert:
            name = (
                get_expert_parallel_rng_tracker_name()
                if self.splits_columns
                else get_data_parallel_rng_tracker_name()
            )
            return get_cuda_rng_tracker().fork(name)
        if self.splits_columns or self.sequence_parallel:
            return get_cuda_rng_tracker().fork()
        return nullcontext()


@dataclass(frozen=True)
class Factor:
    """A factor of an adapter on this rank: the block of a global matrix that a parameter holds.

    Attributes:
        name: The parameter's name in its module.
        key: Key in a checkpoint.
        rows, columns: Its part of the global matrix.
        weight: The weight of the linear layer.
        group: The ranks that share the linear layer.
    """

    name: str
    key: str
    rows: Span
    columns: Span
    weight: LocalWeight
    group: ProcessGroup

    @property
    def is_split(self) -> bool:
        """Whether other ranks hold other parts of it."""
        return not (self.rows.is_whole and self.columns.is_whole)

    def sharded(self, values: Tensor) -> ShardedTensor:
        """Return its place in a checkpoint; every layout gives the same global tensor."""
        lead = self.weight.lead
        offsets = [(axis, at, size) for axis, (at, size) in enumerate(lead)]
        for axis, span in enumerate((self.rows, self.columns), start=len(lead)):
            offsets.append((axis, span.start // span.size, span.total // span.size))
        first, _, *rest = self.weight.replica
        replica = (first, 0 if self.is_split else self.group.rank(), *rest)
        return ShardedTensor.from_rank_offsets(
            self.key, values, *offsets, replica_id=replica, prepend_axis_num=len(lead)
        )


class LinearAdapters(torch.nn.Module):
    """The adapters of the projections in one weight.

    Args:
        weight: The weight.
        chosen: The HuggingFace names of the weights that get an adapter, all in `weight`.
        options: Options of the adapters.
        sequence_parallel: Whether the model is sequence-parallel.
        seed: Seed of the random start; a factor's values depend on it and on the factor's name alone.
    """

    def __init__(
        self,
        weight: LocalWeight,
        chosen: Sequence[str],
        options: LoraOptions,
        sequence_parallel: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self._options = options
        self._parallelism = Parallelism.of(weight, chosen, sequence_parallel)
        self._exchange = self._parallelism.exchange
        # A projection has an A, and a B for each of its parts in a checkpoint.
        parts = [(name, part) for name in chosen for part in weight.spans_of(name)]
        self._arrangement = arrangement(weight, parts)
        self._a = [f"{target_of(name)}_A" for name in chosen]
        self._b = [
            (chosen.index(name), f"{target_of(name)}_B{part.replace('.', '_')}")
            for name, part in parts
        ]
        self._weight = (weight.parameter,)  # in a tuple, so that it is no parameter of this module
        self.factors: list[Factor] = []
        rank, like = options.rank, weight.parameter
        whole = Span(0, rank, rank)
        for name, a in zip(chosen, self._a, strict=True):
            values = start_of_a(seed, name, rank, weight.columns).to(like.device, like.dtype)
            key, _ = factor_keys(weight.key, target_of(name))
            self._add(
                Factor(a, key, whole, weight.columns, weight, self._parallelism.group), values
            )
        for (name, part), (_, b) in zip(parts, self._b, strict=True):
            rows = weight.spans_of(name)[part]
            values = torch.zeros(rows.size, rank, dtype=like.dtype, device=like.device)
            _, key = factor_keys(weight.key + part, target_of(name))
            self._add(Factor(b, key, rows, whole, weight, self._parallelism.group), values)

    def _add(self, factor: Factor, values: Tensor) -> None:
        self.factors.append(factor)
        parameter = torch.nn.Parameter(values)
        _set_attributes(parameter, factor, self._parallelism)
        self.register_parameter(factor.name, parameter)

    @property
    def parameter(self) -> torch.nn.Parameter:
        """The weight of the linear layer."""
        return self._weight[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return what the adapters add to the linear layer's output on this rank.

        Args:
            x: [T, H], the input of the linear layer.
        """
        low = self._exchange(self._low(x) * self._options.scale)
        lows = low.split(self._options.rank, dim=-1)
        high = [F.linear(lows[number], self._factor(b)) for number, b in self._b]
        if len(self._arrangement) == 1:
            return high[0]
        return torch.cat(
            [
                high[0].new_zeros(*high[0].shape[:-1], rows)
                if number is None
                else high[number].narrow(-1, start, rows)
                for number, start, rows in self._arrangement
            ],
            dim=-1,
        )

    def _low(self, x: Tensor) -> Tensor:
        """Return [T, R] of each projection, next to each other."""
        factors = [self._factor(a) for a in self._a]
        if not (self.training and self._options.dropout):
            return F.linear(x, torch.cat(factors) if len(factors) > 1 else factors[0])
        with self._parallelism.random_numbers():
            dropped = [F.dropout(x, self._options.dropout) for _ in factors]
        return torch.cat(
            [F.linear(one, a) for one, a in zip(dropped, factors, strict=True)], dim=-1
        )

    def _factor(self, name: str) -> Tensor:
        """Return a factor; an expert's is used so that its gradient is summed over the expert's ranks."""
        parameter = self.get_parameter(name)
        parallelism = self._parallelism
        if parallelism.is_expert and not getattr(parameter, "tensor_model_parallel"):  # noqa: B009
            return copy_to_tensor_model_parallel_region(parameter, group=parallelism.group)
        return parameter

    def sharded(self, prefix: str) -> Iterator[tuple[str, ShardedTensor]]:
        """Yield the name below `prefix` and the place in a checkpoint of each parameter."""
        for factor in self.factors:
            yield prefix + factor.name, factor.sharded(self.get_parameter(factor.name))

    @torch.no_grad()
    def add_to(self, values: Tensor) -> None:
        """Add scale * B A to the rows of this rank's weight, [O, H] in float32, in place."""
        products = [
            self.get_parameter(b).float()
            @ self.get_parameter(self._a[number]).float()
            * self._options.scale
            for number, b in self._b
        ]
        first = 0
        for number, start, rows in self._arrangement:
            if number is not None:
                values[first : first + rows] += products[number][start : start + rows]
            first += rows


class GroupedAdapters(torch.nn.Module):
    """The adapters of the experts in one grouped layer.

    Args:
        experts: The adapters of each expert of this rank, in their order.
    """

    def __init__(self, experts: Sequence[LinearAdapters]) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(experts)

    def forward(self, x: Tensor, tokens_per_expert: Sequence[int] | Tensor) -> Tensor:
        """Return what the adapters add to the output of the grouped layer.

        Args:
            x: [T, H], sorted by expert.
            tokens_per_expert: Tokens of each expert of this rank.
        """
        if isinstance(tokens_per_expert, Tensor):
            tokens_per_expert = tokens_per_expert.tolist()
        parts = x.split(list(tokens_per_expert))
        return torch.cat([one(part) for one, part in zip(self.experts, parts, strict=True)])


def start_of_a(seed: int, weight: str, rank: int, columns: Span) -> Tensor:
    """Return the columns of the random start of an A: uniform within 1 / sqrt(inputs), as PEFT draws it.

    The whole A is drawn on the CPU, from the seed and the name. So it is the same at every layout.
    """
    digest = hashlib.sha256(f"{seed} {weight}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = 1.0 / math.sqrt(columns.total)
    values = torch.empty(rank, columns.total).uniform_(-bound, bound, generator=generator)
    return values.narrow(1, columns.start, columns.size).contiguous()


def _set_attributes(
    parameter: torch.nn.Parameter, factor: Factor, parallelism: Parallelism
) -> None:
    """Tell Megatron how the gradient of a factor is reduced, and where it counts in the norm."""
    splits = parallelism.splits_rows or parallelism.splits_columns
    attributes = {
        "tensor_model_parallel": factor.is_split,
        "partition_dim": 0 if not factor.rows.is_whole else 1 if factor.is_split else -1,
        "partition_stride": 1,
        "allreduce": getattr(factor.weight.parameter, "allreduce", True),
        "sequence_parallel": splits and parallelism.sequence_parallel and not factor.is_split,
    }
    for name, value in attributes.items():
        setattr(parameter, name, value)
