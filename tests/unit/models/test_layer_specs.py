"""The parts that stand in for Transformer Engine, against plain formulas."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

from megatron_profit.models.layer_specs import RMSNorm


def config(**changes: object) -> TransformerConfig:
    sizes = {"num_layers": 1, "hidden_size": 24, "num_attention_heads": 6, "num_query_groups": 2}
    return TransformerConfig(**{**sizes, **changes})


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_centred_norm_is_transformers(dtype):
    torch.manual_seed(0)
    ours = RMSNorm(config(params_dtype=dtype, layernorm_zero_centered_gamma=True), 24, eps=1e-6)
    assert not ours.weight.any(), "it begins as a norm without a factor"
    theirs = Qwen3_5RMSNorm(24).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(24))
        theirs.weight.copy_(ours.weight)
    x = torch.randn(5, 24, dtype=dtype)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_says_whether_its_gradient_is_partial(sequence_parallel):
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
    assert RMSNorm(config(**parallel), 24).weight.sequence_parallel is sequence_parallel
