"""Megatron-Core's grouped experts without Transformer Engine, as far as checkpoints go.

What names, shapes and places grouped experts have in a checkpoint is decided by Megatron-Core's own
code: `TEGroupedMLP.sharded_state_dict` and, for each of its two linear layers, `_sharded_state_dict_grouped`.
Both run here as they are. Only the layers are stand-ins that hold the parameters of Transformer Engine's
GroupedLinear, weight0, weight1, …, and compute nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP


def _method(name: str) -> Callable[..., dict[str, Any]]:
    """A method of a class that Megatron-Core defines only where Transformer Engine is installed."""
    file = transformer_engine.__file__
    nodes = ast.walk(ast.parse(Path(file).read_text()))
    (found,) = [n for n in nodes if isinstance(n, ast.FunctionDef) and n.name == name]
    space = dict(vars(transformer_engine))
    exec(compile(ast.Module([found], []), file, "exec"), space)
    return space[name]


_sharded_state_dict_grouped = _method("_sharded_state_dict_grouped")


class _GroupedLinear(torch.nn.Module):
    """The parameters of GroupedLinear.

    Args:
        weights: Of each expert, [output, input].
        axis: The axis that expert tensor parallelism splits.
    """

    def __init__(self, weights: list[torch.Tensor], axis: int) -> None:
        super().__init__()
        self.num_gemms, self.use_bias, self._axis = len(weights), False, axis
        for number, weight in enumerate(weights):
            self.register_parameter(f"weight{number}", torch.nn.Parameter(torch.zeros_like(weight)))
        data = parallel_state.get_expert_data_parallel_group()
        self._tp_group = parallel_state.get_expert_tensor_parallel_group()
        self._pg_collection = SimpleNamespace(
            ep=parallel_state.get_expert_model_parallel_group(),
            expt_dp=data,
            expt_dp_gtp_remat=data,
        )

    def get_extra_state(self) -> None:
        """Transformer Engine's state of FP8; there is none."""

    def set_extra_state(self, state: Any) -> None:
        pass

    def _split_extra_state(self, state: Any) -> list[Any]:
        return [state] * self.num_gemms

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        axes = {f"{number}.weight": self._axis for number in range(self.num_gemms)}
        return _sharded_state_dict_grouped(self, axes, prefix, sharded_offsets, metadata)


def group_experts(model: GPTModel) -> None:
    """Put grouped experts, with weights of 0, in the place of a model's sequential ones."""
    for layer in model.decoder.layers:
        sequential = getattr(layer.mlp, "experts", None)
        if sequential is not None:
            layer.mlp.experts = _grouped(sequential)


def _grouped(sequential: SequentialMLP) -> TEGroupedMLP:
    grouped = TEGroupedMLP.__new__(TEGroupedMLP)
    torch.nn.Module.__init__(grouped)
    grouped.config = sequential.config
    grouped.num_local_experts = len(sequential.local_experts)
    grouped.ep_group = parallel_state.get_expert_model_parallel_group()
    grouped.tp_group = parallel_state.get_expert_tensor_parallel_group()
    for name, axis in (("linear_fc1", 0), ("linear_fc2", 1)):
        weights = [getattr(expert, name).weight for expert in sequential.local_experts]
        setattr(grouped, name, _GroupedLinear(weights, axis))
    return grouped
