"""OLMo-2's layer: its norms against plain formulas, and the parts of its spec with either implementation."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import import_module
from megatron.core.transformer.transformer_config import TransformerConfig

from checkpoint_conversion.families.olmo2 import LAYER_SPEC
from megatron_profit.models import layer_specs, olmo2

HEADS, HEAD_DIM, EPSILON = 6, 5, 1e-3


def config(**changes: object) -> TransformerConfig:
    sizes = {"num_layers": 1, "hidden_size": 30, "num_attention_heads": HEADS}
    settings = {"layernorm_epsilon": EPSILON, "normalization": "RMSNorm"}
    return TransformerConfig(**{**sizes, **settings, "transformer_impl": "local", **changes})


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Inputs [S, B, heads, head_dim] that need a gradient, a weight, and the output's gradient."""
    generator = torch.Generator().manual_seed(3)
    shape = (7, 2, HEADS, HEAD_DIM)
    x, upstream = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(HEADS * HEAD_DIM, generator=generator).to(dtype)
    return x.requires_grad_(), weight, upstream


def exact(x: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients in fp64, by the formula, over all heads."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    flat = x.flatten(-2)
    normed = flat * (flat.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt()
    output = (weight * normed).unflatten(-1, (HEADS, HEAD_DIM))
    return [output, *torch.autograd.grad(output, (x, weight), upstream.double())]


@dataclass
class Ranks:
    """A process group whose ranks are threads."""

    count: int
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.count, timeout=60)

    def size(self) -> int:
        return self.count

    def all_reduce(self, tensor: torch.Tensor, group: Ranks) -> None:
        assert group is self
        self.values[threading.get_ident()] = tensor.clone()
        self.barrier.wait()
        total = torch.stack(list(self.values.values())).sum(0)
        self.barrier.wait()
        tensor.copy_(total)


def of_rank(rank: int, group: Ranks, dtype: torch.dtype) -> None:
    x, weight, upstream = problem(dtype)
    heads = HEADS // group.size()
    own = slice(rank * heads, (rank + 1) * heads)
    norm = olmo2.ProjectionNorm(config(params_dtype=dtype), heads, group)
    with torch.no_grad():
        norm.weight.copy_(weight.view(HEADS, -1)[own].flatten())
    output = norm(x[:, :, own])
    gradients = torch.autograd.grad(output, (x, norm.weight), upstream[:, :, own])
    whole, of_x, of_weight = exact(x, weight, upstream)
    expected = [whole[:, :, own], of_x[:, :, own], of_weight.view(HEADS, -1)[own].flatten()]
    assert output.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    found = (output, gradients[0][:, :, own], gradients[1])
    for actual, value in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.double(), value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_norm_over_heads_on_several_ranks_is_the_formula_with_its_gradients(
    monkeypatch, ranks, dtype
):
    group = Ranks(ranks)
    monkeypatch.setattr(torch.distributed, "all_reduce", group.all_reduce)
    with ThreadPoolExecutor(ranks) as threads:
        done = [threads.submit(of_rank, rank, group, dtype) for rank in range(ranks)]
    for rank in done:
        rank.result()


def test_each_rank_counts_its_part_of_the_weight_and_sums_no_gradient():
    """Megatron adds up norms of gradients, and gradients of tensor-parallel ranks, by these attributes."""
    norm = olmo2.ProjectionNorm(config(), 3, Ranks(2))
    assert norm.weight.tensor_model_parallel
    assert not getattr(norm.weight, "sequence_parallel", False)


def test_the_configuration_names_the_layers():
    assert import_module(list(LAYER_SPEC)) is olmo2.layer_spec


def parts(spec):
    """The classes of a layer's linear layers that have a norm inside in Megatron's spec."""
    layer = spec.submodules
    attention, mlp = layer.self_attention.submodules, layer.mlp.keywords["submodules"]
    assert layer.input_layernorm is layer.pre_mlp_layernorm is IdentityOp
    assert layer.self_attention.module is olmo2.NormedSelfAttention
    assert layer.mlp.func == olmo2.NormedMLP.as_mlp_submodule
    return {attention.linear_qkv, mlp.linear_fc1}


@pytest.fixture(autouse=True)
def one_stage(monkeypatch):
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: 0)


def test_a_local_layer_has_its_norms_after_its_blocks():
    spec = olmo2.layer_spec(SimpleNamespace(transformer=config()))
    assert parts(spec.layer_specs[0]) == {ColumnParallelLinear}


def test_a_layer_of_transformer_engine_has_no_norm_inside_its_linear_layers(monkeypatch):
    """The spec of the local layers stands in for the one that only exists with Transformer Engine."""
    local = layer_specs.layer_spec(SimpleNamespace(transformer=config())).layer_specs[0]
    monkeypatch.setattr(layer_specs, "layer_spec", lambda *_: local)
    spec = olmo2.layer_spec(
        SimpleNamespace(transformer=SimpleNamespace(transformer_impl="transformer_engine"))
    )
    assert parts(spec) == {TEColumnParallelLinear}


def test_an_mlp_with_the_norm_inside_is_refused(monkeypatch):
    local = layer_specs.layer_spec(SimpleNamespace(transformer=config())).layer_specs[0]
    local.submodules.mlp = functools.partial(print, **local.submodules.mlp.keywords)
    monkeypatch.setattr(layer_specs, "layer_spec", lambda *_: local)
    with pytest.raises(
        ValueError, match=r"--use-transformer-engine-op-fuser joins .* drop the flag"
    ):
        olmo2.layer_spec(SimpleNamespace(transformer=config()))
