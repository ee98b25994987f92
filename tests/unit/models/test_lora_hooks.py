"""How adapters join a linear layer, for every form of output that Transformer Engine's layers have.

Transformer Engine needs a GPU. These layers return what `LayerNormLinear.forward` returns there
(transformer_engine/pytorch/module/layernorm_linear.py), wrapped as Megatron's
`TELayerNormColumnParallelLinear` wraps it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_profit.models.lora import linear
from megatron_profit.models.lora.linear import GroupedAdapters, Parallelism
from megatron_profit.models.lora.transform import StageAdapters, _attach

TOKENS, INPUTS, OUTPUTS = 6, 8, 5


class NormLinear(torch.nn.Module):
    """A norm and a linear layer in one module."""

    def __init__(self, bias: bool, returns_bias: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(OUTPUTS, INPUTS), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(OUTPUTS), requires_grad=False) if bias else None
        self.te_return_bias = returns_bias and bias
        self.return_layernorm_output = False

    def engine_forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return what Transformer Engine's forward returns."""
        normed = F.rms_norm(x, (INPUTS,))
        out = F.linear(normed, self.weight, None if self.te_return_bias else self.bias)
        if self.te_return_bias:
            return (out, self.bias, normed) if self.return_layernorm_output else (out, self.bias)
        return (out, normed) if self.return_layernorm_output else out

    def forward(self, x: Tensor) -> tuple:
        """Return what Megatron's wrapper returns."""
        out = self.engine_forward(x)
        return out if self.te_return_bias else (out, None)


class LowRank(torch.nn.Module):
    """In place of an adapter: B A x."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(2, INPUTS))
        self.b = torch.nn.Parameter(torch.randn(OUTPUTS, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a.T @ self.b.T


@pytest.mark.parametrize(("bias", "returns_bias"), [(False, False), (True, False), (True, True)])
def test_an_adapter_sees_the_norm_s_output_and_adds_to_the_layer_s(bias, returns_bias):
    torch.manual_seed(0)
    layer, adapter, stage = NormLinear(bias, returns_bias), LowRank(), StageAdapters()
    x = torch.randn(TOKENS, INPUTS, requires_grad=True)
    plain, plain_bias = layer(x)
    _attach(layer, adapter, stage)
    value, given_bias = layer(x)
    expected = plain + adapter(F.rms_norm(x, (INPUTS,)))
    torch.testing.assert_close(value, expected)
    assert given_bias is plain_bias
    upstream = torch.randn(TOKENS, OUTPUTS)
    inputs = [x, adapter.a, adapter.b]
    gradients = torch.autograd.grad(value, inputs, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, upstream))

    stage.is_on = False
    value, given_bias = layer(x)
    assert torch.equal(value, plain)
    assert given_bias is plain_bias


class Grouped(torch.nn.Module):
    """As Transformer Engine's `GroupedLinear`: tokens sorted by expert, and the number of each expert's."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.randn(3, OUTPUTS, INPUTS)

    def forward(self, x: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, None]:
        parts = x.split([int(count) for count in tokens_per_expert])
        return torch.cat([part @ w.T for part, w in zip(parts, self.weights, strict=True)]), None


@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["list", "tensor"])
def test_each_expert_of_a_grouped_layer_has_its_own_adapter(kind):
    torch.manual_seed(0)
    layer, experts = Grouped(), [LowRank() for _ in range(3)]
    counts = [2, 0, 4]
    x = torch.randn(sum(counts), INPUTS)
    expected = layer(x, counts)[0] + torch.cat(
        [one(part) for one, part in zip(experts, x.split(counts), strict=True)]
    )
    _attach(layer, GroupedAdapters(experts), StageAdapters())
    value, bias = layer(x, counts if kind is list else kind(counts))
    torch.testing.assert_close(value, expected)
    assert bias is None


@pytest.mark.parametrize(
    ("is_expert", "splits_columns", "sequence_parallel", "expected"),
    [
        (True, False, False, "data-parallel-rng"),  # the ranks of an expert hold the same tokens
        (True, True, False, "expert-parallel-rng"),
        (False, True, False, "model-parallel-rng"),
        (False, False, True, "model-parallel-rng"),
        (False, False, False, None),
    ],
)
def test_a_dropout_is_alike_where_ranks_hold_the_same_inputs(
    monkeypatch, is_expert, splits_columns, sequence_parallel, expected
):
    forked = []

    class Tracker:
        def fork(self, name: str = "model-parallel-rng") -> None:
            forked.append(name)

    monkeypatch.setattr(linear, "get_cuda_rng_tracker", Tracker)
    parallelism = Parallelism(
        None, not splits_columns, splits_columns, sequence_parallel, is_expert
    )
    parallelism.random_numbers()
    assert forked == [expected] * (expected is not None)
