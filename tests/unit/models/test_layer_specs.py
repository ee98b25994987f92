"""The parts that stand in for Transformer Engine, against plain formulas."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_profit.models.layer_specs import RMSNorm, ScaledDotProductAttention


def config(**changes: object) -> TransformerConfig:
    sizes = {"num_layers": 1, "hidden_size": 24, "num_attention_heads": 6, "num_query_groups": 2}
    return TransformerConfig(**{**sizes, "attention_dropout": 0.0, **changes})


def attention(**changes: object) -> ScaledDotProductAttention:
    return ScaledDotProductAttention(config(**changes), 1, AttnMaskType.causal, "self")


def reference(query, key, value, forbidden):
    """softmax(q k / sqrt(d)) v in fp64, the key/value heads repeated; [S, B, heads, d] inputs."""
    repeats = query.size(2) // key.size(2)
    q, k, v = (t.double().permute(1, 2, 0, 3) for t in (query, key, value))
    k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
    scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(forbidden, -torch.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_attention_is_causal_and_groups_queries(groups):
    torch.manual_seed(0)
    query, key, value = (torch.randn(7, 3, heads, 4) for heads in (6, groups, groups))
    causal = torch.ones(7, 7).triu(1).bool()
    expected = reference(query, key, value, causal)
    actual = attention(num_query_groups=groups)(query, key, value, None)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_attention_takes_megatrons_mask():
    torch.manual_seed(0)
    query, key, value = (torch.randn(5, 2, heads, 4) for heads in (6, 2, 2))
    forbidden = torch.rand(2, 1, 5, 5) > 0.6
    forbidden[..., 0] = False
    expected = reference(query, key, value, forbidden)
    actual = attention()(query, key, value, forbidden)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"context_parallel_size": 2}, "context_parallel_size=2"),
        ({"window_size": (4, 0)}, "window_size"),
        ({"softmax_type": "learnable"}, "softmax_type=learnable"),
    ],
)
def test_attention_refuses_what_it_cannot_do(changes, named):
    with pytest.raises(ValueError, match=named):
        attention(**changes)


def test_attention_refuses_packed_sequences():
    tensors = [torch.randn(5, 2, heads, 4) for heads in (6, 2, 2)]
    with pytest.raises(ValueError, match="packed"):
        attention()(*tensors, None, packed_seq_params=object())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_divides_by_the_root_mean_square(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(config(params_dtype=dtype), 24, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(24))
    x = torch.randn(5, 24, dtype=dtype)
    exact = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = exact * norm.weight.double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(norm(x).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_says_whether_its_gradient_is_partial(sequence_parallel):
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
    assert RMSNorm(config(**parallel), 24).weight.sequence_parallel is sequence_parallel
