"""The transform of a model: its weights are frozen, and linear layers get adapters.

The adapters of a pipeline stage are one module, `lora`, of the stage. Forward hooks add their outputs to
the layers' outputs, so the layers keep their classes, names and weights. Afterwards the stage's checkpoint
holds the adapters alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from checkpoint_conversion.adapters.options import LoraOptions, adapted_weights
from checkpoint_conversion.families import TensorRule
from checkpoint_conversion.hf.shards import Shard
from megatron_profit.models.lora.linear import GroupedAdapters, LinearAdapters
from megatron_profit.models.lora.placement import (
    LocalWeight,
    local_weights,
    rows_before,
    sharded_tensors,
)

_ADAPTERS = "lora"


class StageAdapters(torch.nn.Module):
    """The adapters of a pipeline stage, and the switch that turns them off.

    Attributes:
        is_on: Whether the linear layers add the adapters' outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_on = True
        self.layers = torch.nn.ModuleDict()

    def add(self, module: str, adapters: torch.nn.Module) -> None:
        """Add the adapters of a linear layer."""
        self.layers[module.replace(".", "/")] = adapters

    def each(self) -> Iterator[tuple[str, LinearAdapters]]:
        """Yield the adapters of each weight, with the prefix of their parameters' names."""
        for name, module in self.named_modules():
            if isinstance(module, LinearAdapters):
                yield f"{name}.", module

    def sharded(self, prefix: str) -> dict[str, ShardedTensor]:
        """Return the place in a checkpoint of each parameter, by its name below `prefix`."""
        return {
            name: item for inner, one in self.each() for name, item in one.sharded(prefix + inner)
        }


class _AdaptedStage:
    """A pipeline stage whose checkpoints hold adapters alone; combined with the stage's own class."""

    lora: StageAdapters

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return the adapters' places in a checkpoint."""
        return self.lora.sharded(f"{prefix}{_ADAPTERS}.")

    def base_sharded_state_dict(self) -> dict[str, Any]:
        """Return the frozen weights' places in a checkpoint."""
        content = super().sharded_state_dict()  # type: ignore[misc]
        return {name: item for name, item in content.items() if not is_adapter(name)}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the adapters; with `strict` all of them, and none that the stage does not have."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)  # type: ignore[misc]
        missing = [name for name in result.missing_keys if is_adapter(name)]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(
                f"the adapters of the checkpoint are others: missing {missing[:3]}, unknown "
                f"{result.unexpected_keys[:3]}"
            )
        return result


def is_adapter(name: str) -> bool:
    """Return whether a stage's parameter is part of an adapter."""
    return name.startswith(f"{_ADAPTERS}.")


def adapters_of(chunk: MegatronModule) -> StageAdapters | None:
    """Return the adapters of a pipeline stage; None where it has none."""
    return chunk.lora if isinstance(chunk, _AdaptedStage) else None


def base_state(chunk: MegatronModule) -> dict[str, Any]:
    """Return the sharded state dict of a stage's weights, whether it has adapters or not."""
    if isinstance(chunk, _AdaptedStage):
        return chunk.base_sharded_state_dict()
    return chunk.sharded_state_dict()


def base_parameters(chunk: MegatronModule) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the names and parameters of a stage's weights, without adapters."""
    return (item for item in chunk.named_parameters() if not is_adapter(item[0]))


def adapt(
    chunks: Sequence[MegatronModule],
    rules: Iterable[TensorRule],
    options: LoraOptions,
    seed: int,
) -> None:
    """Freeze a model and give its projections adapters: A is random and B is 0.

    Args:
        chunks: The rank's pipeline stages, before they are wrapped.
        rules: The name table of the model.
        options: Options of the adapters, with the names of the projections.
        seed: Seed of the random start.

    Raises:
        ConversionError: A tensor of the model has no place in the name table, or its rows cannot be split.
    """
    rules = tuple(rules)
    adapted = adapted_weights(rules, options)
    for chunk in chunks:
        _adapt_stage(chunk, rules, adapted, options, seed)


def _adapt_stage(
    chunk: MegatronModule,
    rules: Sequence[TensorRule],
    adapted: Container[str],
    options: LoraOptions,
    seed: int,
) -> None:
    made: dict[str, list[LinearAdapters]] = {}
    for weight in local_weights(chunk, rules):
        chosen = _chosen(weight, adapted)
        if chosen:
            one = LinearAdapters(weight, chosen, options, chunk.config.sequence_parallel, seed)
            made.setdefault(weight.module, []).append(one)
    chunk.requires_grad_(False)
    adapters = StageAdapters()
    for module, parts in made.items():
        linear = chunk.get_submodule(module)
        grouped = hasattr(linear, "num_gemms")
        own = GroupedAdapters(parts) if grouped else parts[0]
        adapters.add(module, own)
        _attach(linear, own, adapters)
    chunk.add_module(_ADAPTERS, adapters)
    kind = type(chunk)
    chunk.__class__ = type(f"Adapted{kind.__name__}", (_AdaptedStage, kind), {})
    if getattr(chunk, "pre_process", False):
        chunk.embedding.register_forward_hook(_require_gradient)


def _chosen(weight: LocalWeight, adapted: Container[str]) -> list[str]:
    """Return the HuggingFace weights in a weight that get an adapter, in the order of the rows."""
    return list(dict.fromkeys(run.weight for run in weight.runs if run.weight in adapted))


def _attach(linear: torch.nn.Module, adapters: torch.nn.Module, stage: StageAdapters) -> None:
    """Let a linear layer add the outputs of its adapters, while the switch of its stage is on.

    Transformer Engine's layers with a norm inside return the norm's output too, which is the adapters' input.
    """
    if hasattr(linear, "return_layernorm_output"):
        setattr(linear, "return_layernorm_output", True)  # noqa: B010

    def add(_: torch.nn.Module, inputs: tuple, output: Any) -> tuple[Tensor, Tensor | None]:
        x, *more = inputs
        value, bias = output[0], output[1]
        if isinstance(value, tuple):  # no bias to return: ((value, norm), None)
            value, x = value
        elif len(output) == 3:  # (value, bias, norm)
            x = output[2]
        return (value + adapters(x, *more) if stage.is_on else value), bias

    linear.register_forward_hook(add)


def _require_gradient(_: torch.nn.Module, __: tuple, output: Tensor) -> Tensor:
    """Let the graph begin at the embedding's output.

    Recomputation drops the graph of a layer none of whose inputs needs a gradient, and with it the adapters'.
    """
    return output.requires_grad_() if torch.is_grad_enabled() else output


@contextlib.contextmanager
def adapters_off(chunks: Iterable[MegatronModule]) -> Iterator[None]:
    """Turn the adapters off inside the block: the model is its frozen base."""
    stages = [stage for stage in map(adapters_of, chunks) if stage is not None]
    before = [stage.is_on for stage in stages]
    for stage in stages:
        stage.is_on = False
    try:
        yield
    finally:
        for stage, was_on in zip(stages, before, strict=True):
            stage.is_on = was_on


def adapter_shards(chunks: Iterable[MegatronModule]) -> Iterator[tuple[Shard, bool]]:
    """Yield the shards whose values are this rank's adapters, each with whether this rank saves it."""
    for chunk in chunks:
        for item in chunk.sharded_state_dict().values():
            yield _shard(item, item.data.detach())


@dataclass
class _Merged:
    """The merged values of the weight that was asked for last."""

    parameter: torch.nn.Parameter | None = None
    values: Tensor | None = None

    def of(self, parameter: torch.nn.Parameter, adapters: LinearAdapters) -> Tensor:
        """Return [O, H] float32."""
        if parameter is not self.parameter or self.values is None:
            self.parameter, self.values = parameter, parameter.detach().float().clone()
            adapters.add_to(self.values)
        return self.values


def merged_shards(chunks: Iterable[MegatronModule]) -> Iterator[tuple[Shard, bool]]:
    """Yield the shards of this rank's weights with the adapters merged in, in float32 where there are any.

    One weight's merged values are in memory at a time.
    """
    merged = _Merged()
    for chunk in chunks:
        stage = adapters_of(chunk)
        assert stage is not None
        owners = {one.parameter.untyped_storage().data_ptr(): one for _, one in stage.each()}
        for item in sharded_tensors(base_state(chunk)):
            values, owner = item.data, owners.get(item.data.untyped_storage().data_ptr())
            if owner is not None and item.data.ndim == 2:
                first = rows_before(values, owner.parameter)
                values = merged.of(owner.parameter, owner)[first : first + len(values)]
            yield _shard(item, values)


def _shard(item: ShardedTensor, values: Tensor) -> tuple[Shard, bool]:
    shard = Shard(item.key, item.global_shape, item.global_offset, values)
    return shard, is_main_replica(item.replica_id)
